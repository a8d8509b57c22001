"""Mixtures of experts: packed, run, restored, saved, in each form in which transformers holds the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import unicorn_backend
from unicorn_backend.errors import QuantizationError
from unicorn_backend.layouts import dequantize
from unicorn_backend.quantize.experts import StackedExperts

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}


def make(model_type: str) -> Any:
    """gpt_oss: transposed weights, biases, gate and up interleaved, a gate of its own."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES, pad_token_id=0, eos_token_id=1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 64**-0.5)
    return model


def experts_of(model: nn.Module) -> Any:
    return next(module for name, module in model.named_modules() if name.endswith("experts"))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_packed_experts_compute_what_the_float_ones_do(model_type: str) -> None:
    """Against transformers' own forward with the values that the packed weights stand for: int8 activations remain."""
    model, other = make(model_type), make(model_type)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    unicorn_backend.quantize(model, keep_weights=True)
    packed, plain = experts_of(model), experts_of(other)
    assert isinstance(packed, StackedExperts)
    for name in ("gate_up_proj", "down_proj"):
        linear = packed._modules[name.removesuffix("_proj")]
        values = dequantize(linear.packed, *linear.weight_shape).unflatten(0, (4, -1))
        plain._parameters[name].data.copy_(values.transpose(1, 2) if plain.is_transposed else values)
    x, index = torch.randn(7, 64), torch.stack([torch.randperm(4)[:2] for _ in range(7)])
    weights = torch.rand(7, 2)
    with torch.no_grad():
        got, want = packed(x, index, weights), plain(x, index, weights)
    assert (got - want).norm() < 0.02 * want.norm()
    unicorn_backend.restore(model)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_a_packed_checkpoint_with_experts_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = unicorn_backend.quantize(make("qwen3_moe"))
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        want = model(ids).logits
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert isinstance(experts_of(loaded), StackedExperts)
        assert torch.equal(loaded(ids).logits, want)


def test_a_bad_value_changes_nothing() -> None:
    model = make("mixtral")
    experts_of(model).down_proj.data[1, 2, 3] = torch.nan
    with pytest.raises(QuantizationError, match="NaN"):
        unicorn_backend.quantize(model)
    assert not isinstance(experts_of(model), StackedExperts) and isinstance(model.lm_head.weight, nn.Parameter)
