"""What counts as a language model, by structure alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.quantize.conftest import Small
from unicorn_backend.models.random import random_model
from unicorn_backend.quantize.structure import is_language_model

LANGUAGE = (
    "Gemma3ForCausalLM",
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "MistralForCausalLM",
    "GPTNeoXForCausalLM",
    "LlamaModel",  # a backbone: no head, but gated feed-forward and attention
)
OTHER = ("BertForSequenceClassification", "ViTForImageClassification", "ResNetForImageClassification")


def _tiny(name: str) -> nn.Module:
    import transformers

    cls = getattr(transformers, name)
    sizes = dict(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        image_size=32,
        patch_size=16,
        embedding_size=8,
        hidden_sizes=[8, 8],
        depths=[1, 1],
    )
    with torch.device("meta"):
        config = cls.config_class()
        for key, value in sizes.items():
            if hasattr(config, key):
                setattr(config, key, value)
        if hasattr(config, "layer_types"):
            config.layer_types = ["full_attention"]
        config.pad_token_id = None if name not in OTHER else 0
        return cls(config)


@pytest.mark.parametrize("name", LANGUAGE)
def test_language_models(name: str) -> None:
    yes, why = is_language_model(_tiny(name))
    assert yes and why


@pytest.mark.parametrize("name", OTHER)
def test_others(name: str) -> None:
    yes, why = is_language_model(_tiny(name))
    assert not yes and why


def test_true_size_on_meta() -> None:
    with torch.device("meta"):
        assert is_language_model(Small(tied=False))[0]


def test_random_gemma() -> None:
    assert is_language_model(random_model("gemma3-1b", num_hidden_layers=1, vocab_size=256, hidden_size=64))[0]


def test_plain_modules() -> None:
    assert not is_language_model(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)))[0]
    assert not is_language_model(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 10)))[0]
    assert not is_language_model(nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2)))[0]
