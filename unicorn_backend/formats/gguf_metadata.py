"""What llama.cpp reads of a model: architectures that GGUF is written for, their metadata and their rotary tables.

Where llama.cpp has a constant in its code instead of a key in the file (src/models/), the config must say the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gguf import GGUFWriter, RopeScalingType
from torch import Tensor

from unicorn_backend.errors import CheckpointError
from unicorn_backend.formats.safetensors import StoredTensor

if TYPE_CHECKING:
    from unicorn_backend.quantize.source import Source

ARCHITECTURES = {
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}  # transformers' model_type -> GGUF's
ROPE_FREQS = "rope_freqs.weight"
WIDE = {"gemma2": 46, "gemma3": 62}  # layers of the 27B models, whose attention llama.cpp scales otherwise
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def architecture(source: Source) -> str:
    """GGUF's name of the model's architecture. CheckpointError for one that is not written."""
    kind = source.config.model_type
    if kind not in ARCHITECTURES:
        raise CheckpointError(
            f"{source.place}: --format gguf writes text models of {', '.join(ARCHITECTURES)}; this is {kind!r}"
        )
    return ARCHITECTURES[kind]


def head_dim(config: Any) -> int:
    """Columns of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def write(writer: GGUFWriter, source: Source) -> None:
    """Add everything but the tokenizer and the type of the file."""
    config, name = source.config, architecture(source)
    writer.add_name(Path(source.name).name)
    writer.add_quantization_version(2)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if name in WIDE:
        _write_gemma(writer, source, name)
    else:
        _write_plain(writer, source)


def _write_gemma(writer: GGUFWriter, source: Source, name: str) -> None:
    config = source.config
    wide = config.num_hidden_layers == WIDE[name]
    scale = config.hidden_size // config.num_attention_heads if wide else config.head_dim
    if config.query_pre_attn_scalar != scale:
        raise _refused(source, f"query_pre_attn_scalar {config.query_pre_attn_scalar}, llama.cpp takes {scale}")
    sliding = [kind == "sliding_attention" for kind in config.layer_types]
    writer.add_context_length(config.max_position_embeddings)
    writer.add_sliding_window(config.sliding_window)
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if name == "gemma3":
        rope: dict[str, Any] = config.rope_parameters
        writer.add_array("gemma3.attention.sliding_window_pattern", sliding)
        writer.add_float32("gemma3.rope.freq_base_swa", rope["sliding_attention"]["rope_theta"])
        _write_rotary(writer, source, rope["full_attention"])
        return
    if sliding != [i % 2 == 0 for i in range(len(sliding))] or not config.attn_logit_softcapping:
        raise _refused(source, "layers that do not slide in turn from the first on, or no attn_logit_softcapping")
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    _write_rotary(writer, source, config.rope_parameters)


def _write_plain(writer: GGUFWriter, source: Source) -> None:
    """Llama, Mistral, Qwen. llama.cpp knows no sliding window there: up to its width there is no difference."""
    config = source.config
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    writer.add_context_length(min(window, config.max_position_embeddings))
    writer.add_rope_dimension_count(head_dim(config))
    _write_rotary(writer, source, config.rope_parameters)


def _write_rotary(writer: GGUFWriter, source: Source, rope: dict[str, Any]) -> None:
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3") or rope.get("partial_rotary_factor", 1) != 1:
        raise _refused(source, f"rotary embedding {rope}; written are default, linear and llama3 over whole heads")
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _refused(source: Source, what: str) -> CheckpointError:
    return CheckpointError(f"{source.place}: --format gguf: config.json has {what}; write another format")


@dataclass(frozen=True)
class ComputedTensor(StoredTensor):
    """A float vector that follows from the config; `file` is the config's place."""

    values: Tensor = field(default_factory=lambda: torch.empty(0), compare=False)

    def read(self, first: int = 0, last: int | None = None) -> Tensor:
        return self.values[first:last]


def computed(source: Source) -> list[StoredTensor]:
    """Tensors that the file has and the model has not: how llama3's rotary embedding stretches each frequency."""
    rope: Any = source.config.rope_parameters
    if architecture(source) != "llama" or rope.get("rope_type") != "llama3":
        return []
    size = head_dim(source.config)
    return [ComputedTensor(ROPE_FREQS, torch.float32, (size // 2,), source.place, 0, llama3_factors(rope, size))]


def llama3_factors(rope: dict[str, Any], size: int) -> Tensor:
    """fp32 [size / 2], by what each frequency is divided (transformers' modeling_rope_utils, convert_hf_to_gguf.py)."""
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # within the original context
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return factors


def rotary_of(stored: Tensor, theta: float) -> dict[str, Any] | None:
    """The rope_parameters of a file with this table: Llama 3.1's with any factor; None for an unknown table."""
    values = stored.float()
    if bool((values == 1).all()):
        return {"rope_type": "default", "rope_theta": theta}
    rope = {"rope_type": "llama3", "rope_theta": theta, "factor": float(values.max()), **_LLAMA3}
    expected = llama3_factors(rope, 2 * len(values))
    return rope if torch.allclose(values, expected, rtol=1e-3) else None
