"""Mixtures of experts: packed, run, restored, saved, in each form in which transformers holds the weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import unicorn_backend
from unicorn_backend.errors import CheckpointError, QuantizationError
from unicorn_backend.layouts import dequantize
from unicorn_backend.quantize import stream
from unicorn_backend.quantize.experts import StackedExperts
from unicorn_backend.quantize.verify import verify

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


def make(model_type: str, **extra: Any) -> Any:
    """gpt_oss: transposed weights, biases, gate and up interleaved, a gate of its own."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **extra}, pad_token_id=0, eos_token_id=1)
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


GEMMA4 = {
    "global_head_dim": 16,
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 0,
    "num_hidden_layers": 2,
    "num_experts": 4,
    "top_k_experts": 2,
    "enable_moe_block": True,
    "num_kv_shared_layers": 0,
}


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "gemma4_text", "gpt_oss"])
def test_a_packed_checkpoint_with_experts_loads(model_type: str, tmp_path: Path) -> None:
    """Quantized in memory, while loading, or from disk to disk in blocks that end within an expert: the same bytes.

    The first two are stored expert by expert, Mixtral's also under other names; Gemma 4's as 3-D tensors, GPT-OSS's
    as transposed ones.
    """
    from transformers import AutoModelForCausalLM

    extra = GEMMA4 if model_type == "gemma4_text" else {}
    make(model_type, **extra).bfloat16().save_pretrained(tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype="auto").eval()
    unicorn_backend.quantize(model).save_pretrained(tmp_path / "saved")
    config = unicorn_backend.UnicornConfig()
    loading = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype="auto", quantization_config=config).eval()
    assert isinstance(experts_of(loading), StackedExperts)
    loading.save_pretrained(tmp_path / "loaded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "BLOCK_BYTES", 48 * 64 * 2)
        result = stream.quantize_checkpoint(tmp_path / "float", tmp_path / "streamed")
    schemes = {row["scheme"] for row in result["weights"] if re.search(r"\.experts\.\w+\.weight$", row["name"])}
    assert schemes == {"w4g32"} and verify(tmp_path / "streamed", progress=False) == []
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        want = model(ids).logits
        assert torch.equal(loading(ids).logits, want)
        for name in ("saved", "loaded", "streamed"):
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
            assert isinstance(experts_of(loaded), StackedExperts)
            assert torch.equal(loaded(ids).logits, want)


def test_experts_that_cannot_be_stacked_are_copied(tmp_path: Path) -> None:
    """For formats that hold experts one by one. Experts that are not all there are an error."""
    make("qwen3_moe").save_pretrained(tmp_path / "qwen")
    stream.quantize_checkpoint(tmp_path / "qwen", tmp_path / "vllm", format="compressed-tensors")
    names = safe_open(tmp_path / "vllm" / "model.safetensors", "pt").keys()
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in names
    tensors = load_file(tmp_path / "qwen" / "model.safetensors")
    del tensors["model.layers.0.mlp.experts.2.up_proj.weight"]
    save_file(tensors, tmp_path / "qwen" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts\.gate_up_proj have 224 of 256 rows"):
        stream.quantize_checkpoint(tmp_path / "qwen", tmp_path / "damaged")
    assert not (tmp_path / "damaged").exists()


def test_a_bad_value_changes_nothing() -> None:
    model = make("mixtral")
    experts_of(model).down_proj.data[1, 2, 3] = torch.nan
    with pytest.raises(QuantizationError, match="NaN"):
        unicorn_backend.quantize(model)
    assert not isinstance(experts_of(model), StackedExperts) and isinstance(model.lm_head.weight, nn.Parameter)


def test_a_bad_value_stops_loading(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = make("gpt_oss")
    experts_of(model).down_proj.data[1, 2, 3] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(QuantizationError, match=r"experts\.down_proj.*NaN"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=unicorn_backend.UnicornConfig())
