"""GGUF files of Llama and Qwen: weights stay packed with their stored values, under the right name, in order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from unicorn_backend import quantize_checkpoint, verify
from unicorn_backend.formats.gguf_out import to_q4_k, to_q6_k
from unicorn_backend.layouts import dequantize
from unicorn_backend.quantize.schemes import quantize_weight

HEADS, KV_HEADS, LAYERS, HIDDEN, VOCABULARY = 4, 2, 2, 256, 300
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 512, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": 64, "max_position_embeddings": 512,
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
SCHEMES = {"q_proj": "q4k", "down_proj": "q6k", "embed_tokens": "w8g32", "lm_head": "w8g32"}  # the rest: Q4_0


def blocks_of(name: str, weight: torch.Tensor) -> tuple[np.ndarray, Type]:
    """Rows of a weight as GGUF stores them, of the type for its module."""
    kind = next((scheme for part, scheme in SCHEMES.items() if part in name), "w4g32")
    if kind in ("q4k", "q6k"):
        rows = {"q4k": to_q4_k, "q6k": to_q6_k}[kind](quantize_weight(weight, kind))
        return rows[: weight.shape[0]].numpy(), {"q4k": Type.Q4_K, "q6k": Type.Q6_K}[kind]
    stored = Type.Q8_0 if kind == "w8g32" else Type.Q4_0
    return gguf.quants.quantize(weight.numpy(), stored), stored


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k as llama.cpp orders them for Llama: the two halves of each head alternate."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write(path: Path, architecture: str, model: Any) -> dict[str, np.ndarray]:
    """A GGUF file of the model; returns {name in transformers: the values stored, in its row order}."""
    writer = gguf.GGUFWriter(path, architecture)
    config = model.config
    writer.add_block_count(LAYERS)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(64)
    writer.add_value_length(64)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    letters = [chr(33 + i) for i in range(90)]
    writer.add_token_list([*letters, "AB", *(f"<{i}>" for i in range(VOCABULARY - 91))])
    writer.add_token_types([1] * VOCABULARY)
    writer.add_token_merges(["A B"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], LAYERS)
    values = {}
    for name, parameter in model.state_dict().items():
        w = parameter.float()
        renamed = names.get_name(name, (".weight", ".bias"))
        if w.dim() == 1:
            writer.add_tensor(renamed, w.numpy())
            values[name] = w.numpy()
            continue
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2]) if architecture == "llama" else None
        blocks, kind = blocks_of(name, interleaved(w, heads) if heads else w)
        writer.add_tensor(renamed, blocks, raw_dtype=kind)
        stored = torch.from_numpy(gguf.quants.dequantize(blocks, kind))
        halves = (stored.view(heads, -1, 2, w.shape[1]).transpose(1, 2) if heads else stored).reshape(w.shape)
        values[name] = halves.numpy()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@pytest.mark.parametrize("architecture", CONFIGS)
def test_stays_packed(tmp_path: Path, architecture: str) -> None:
    torch.manual_seed(0)
    config: PretrainedConfig = CONFIGS[architecture](**SIZES)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():  # norms and biases that differ
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.copy_(torch.randn(p.shape) * 0.1 + float("norm" in name))
    values = write(tmp_path / "model.gguf", architecture, model)
    result = quantize_checkpoint(tmp_path / "model.gguf", tmp_path / "out")
    assert result["notes"] == [] and sum(row["exact"] for row in result["weights"]) == 7 * LAYERS + 2
    assert verify(tmp_path / "out") == []
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    modules = dict(loaded.named_modules())
    for name, expected in values.items():
        module, _, part = name.rpartition(".")
        if part == "weight" and expected.ndim == 2:
            got = dequantize(modules[module].packed, *expected.shape).numpy()
        else:
            got = loaded.get_parameter(name).detach().float().numpy()
        assert np.array_equal(got, expected), name
    # the float model with the stored values: INT8 activations and bf16 are all that is left between the two
    model.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in values.items()})
    ids = torch.tensor([[5, 17, 250, 99, 3, 42, 7]])
    with torch.no_grad():
        logits, wanted = loaded(ids).logits.float(), model.float()(ids).logits
    error = float((logits - wanted).norm() / wanted.norm())
    # An activation in INT8 per 32 has a relative error of about 0.6 % (amax / 127 / sqrt(12) over a deviation of
    # amax / 2.3), bf16 0.2 %; nine products and residuals after each other stay below the sum, 9 * 0.6 %.
    assert 1e-4 < error < 0.054, error
    compiled = torch.compile(loaded, backend="unicorn")
    out = compiled.generate(ids, max_new_tokens=2, do_sample=False)
    assert out.shape == (1, 9)
