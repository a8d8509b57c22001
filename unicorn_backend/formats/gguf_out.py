"""GGUF out: one file that llama.cpp runs. w4g32 becomes Q4_0, w4n32 IQ4_NL, w8g32 Q8_0 with the same values.

Q4_0's 18 bytes hold what our search found for a group, so a file written here has Q4_0's size and less error
than llama.cpp's own. w8c and w8a become Q8_0, with a scale per 32 weights instead of one per row. Norms are
fp32, as llama.cpp wants.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType, RopeScalingType
from torch import Tensor
from transformers.modeling_gguf_pytorch_utils import Gemma2TensorProcessor, get_gguf_hf_weights_map

from unicorn_backend.errors import CheckpointError
from unicorn_backend.formats import gguf_tokenizer
from unicorn_backend.formats.target import (
    LOSSLESS,
    Declared,
    Encoded,
    Layout,
    Noise,
    Place,
    Rows,
    packed_with_noise,
    squares,
)
from unicorn_backend.layouts import GROUP, ROWS, W4_ZERO, unpack_w4g32, unpack_w8g32
from unicorn_backend.quantize.recipe import FLOAT

if TYPE_CHECKING:
    from unicorn_backend.quantize.skeleton import Skeleton
    from unicorn_backend.quantize.source import Source

FILE = "model.gguf"
ALIGNMENT = 32
Type = GGMLQuantizationType
_TYPES = {"w4g32": Type.Q4_0, "w4n32": Type.IQ4_NL, "w8g32": Type.Q8_0, "w8c": Type.Q8_0, "w8a": Type.Q8_0}
_FLOATS = {torch.float32: Type.F32, torch.float16: Type.F16, torch.bfloat16: Type.BF16}


class GgufOut:
    """A Gemma 3 text model as `model.gguf`."""

    name = "gguf"

    def __init__(self, source: Source, model: Skeleton) -> None:
        if source.config.model_type != "gemma3_text":
            raise CheckpointError(
                f"{source.place}: --format gguf writes Gemma 3 text models; this is {source.config.model_type!r}"
            )
        self._source = source
        names = get_gguf_hf_weights_map(model.model, Gemma2TensorProcessor())
        self._names: dict[str, str] = {hf: gguf for gguf, hf in names.items()}
        self._types: dict[str, Type] = {}

    def label(self, shape: tuple[int, ...], scheme: str) -> str:
        return FLOAT if scheme == FLOAT else str(_TYPES[scheme].name)

    def outputs(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], scheme: str) -> Declared:
        if scheme not in (*_TYPES, FLOAT):
            raise CheckpointError(f"{name}: --format gguf writes {', '.join(_TYPES)}, not {scheme}")
        if scheme != FLOAT and shape[1] % GROUP:
            raise CheckpointError(f"{name}: {shape[1]} columns are no multiple of {GROUP}, which GGUF blocks need")
        kind = _TYPES[scheme] if scheme != FLOAT else Type.F32 if len(shape) == 1 else _FLOATS[dtype]
        elements, size = GGML_QUANT_SIZES[kind]
        renamed = self._renamed(name)
        self._types[renamed] = kind
        return {renamed: (torch.uint8, (*shape[:-1], shape[-1] // elements * size))}

    def encode(
        self, name: str, shape: tuple[int, ...], scheme: str, first: int, rows: Rows
    ) -> tuple[list[Encoded], Noise]:
        renamed = self._renamed(name)
        if scheme == FLOAT:
            assert isinstance(rows, Tensor)
            values = rows.float() + (1.0 if "norm.weight" in renamed else 0.0) if len(shape) == 1 else rows
            return [(renamed, first * values.element_size(), values)], LOSSLESS
        data, noise = _q8_0(rows) if scheme in ("w8c", "w8a") else _same_values(rows, scheme)
        data = data[: shape[0] - first]
        return [(renamed, first * data.shape[1], data)], noise

    def layout(self, declared: Declared, shard_bytes: int) -> Layout:
        writer = GGUFWriter(path=None, arch="gemma3")
        _write_metadata(writer, self._source, self._types)
        for name, (_, shape) in declared.items():
            writer.add_tensor_info(name, list(shape), np.dtype(np.uint8), int(np.prod(shape)), self._types[name])
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / FILE
            writer.write_header_to_file(path)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            writer.close()
            header = path.read_bytes()
        header += bytes(-len(header) % ALIGNMENT)
        places, end = {}, len(header)
        for name, (_, shape) in declared.items():
            nbytes = int(np.prod(shape))
            places[name] = Place(FILE, end, nbytes)
            end += nbytes + -nbytes % ALIGNMENT
        return Layout({FILE: header}, places, {})

    def write_beside(self, folder: Path, source: Source, model: Skeleton, labels: Mapping[str, str]) -> None:
        """Nothing: the file holds config and tokenizer."""

    def _renamed(self, name: str) -> str:
        if name not in self._names:
            raise CheckpointError(f"{name}: GGUF has no name for it")
        return self._names[name]


def _same_values(rows: Rows, scheme: str) -> tuple[Tensor, Noise]:
    """Blocks with the values that the scheme gives."""
    packed, noise = packed_with_noise(rows, scheme)
    return (to_q8_0(packed) if scheme == "w8g32" else to_q4_0(packed)), noise


def to_q4_0(packed: list[Tensor]) -> Tensor:
    """w4g32 or w4n32 -> Q4_0 or IQ4_NL rows uint8 [16 * N16, K32 * 18]; the inverse of `repack_q4_0`."""
    w, s = packed[:2]
    n, k32 = w.shape[0] * ROWS, w.shape[1]
    q, scales = unpack_w4g32(w, s, n, k32 * GROUP)
    nibbles = (q + W4_ZERO).to(torch.uint8).view(n, k32, 2, 16)
    return _blocks(scales, nibbles[:, :, 0] | (nibbles[:, :, 1] << 4))


def to_q8_0(packed: list[Tensor]) -> Tensor:
    """w8g32 [w, s] -> Q8_0 rows uint8 [16 * N16, K32 * 34]; the inverse of `repack_q8_0`."""
    w, s = packed
    n, k32 = w.shape[0] * ROWS, w.shape[1]
    q, scales = unpack_w8g32(w, s, n, k32 * GROUP)
    return _blocks(scales, q.view(torch.uint8).view(n, k32, GROUP))


def _blocks(scales: Tensor, rest: Tensor) -> Tensor:
    """fp16 [n, groups] before uint8 [n, groups, bytes], as rows."""
    scale_bytes = scales.flatten().view(torch.uint8).view(*scales.shape, 2)
    return torch.cat((scale_bytes, rest), dim=-1).view(scales.shape[0], -1)


def _q8_0(rows: Rows) -> tuple[Tensor, Noise]:
    """Q8_0 blocks uint8 [n, k / 32 * 34], to the bit as llama.cpp quantizes: q = round(x / (amax / 127))."""
    assert isinstance(rows, Tensor)
    if not torch.isfinite(rows).all():
        raise ValueError("NaN or Inf")
    x = rows.float().view(rows.shape[0], -1, GROUP)
    d = x.abs().amax(-1, keepdim=True) / 127
    scaled = x * torch.where(d == 0, torch.zeros_like(d), 1 / d)
    size = scaled.abs()
    q = torch.copysign(size.floor() + (2 * (size - size.floor())).floor(), scaled)  # half away from zero
    stored = d.half()
    error = x - q * stored.float()
    return _blocks(stored[..., 0], q.to(torch.int8).view(torch.uint8)), (squares(x), squares(error))


def _write_metadata(writer: GGUFWriter, source: Source, types: Mapping[str, Type]) -> None:
    """What llama.cpp reads of a Gemma 3 text model (src/models/gemma3.cpp)."""
    config = source.config
    rope: dict[str, Any] = config.rope_parameters
    full, local = rope["full_attention"], rope["sliding_attention"]
    writer.add_name(Path(source.name).name)
    writer.add_file_type(_file_type(types))
    writer.add_quantization_version(2)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_sliding_window(config.sliding_window)
    writer.add_array(
        "gemma3.attention.sliding_window_pattern", [kind == "sliding_attention" for kind in config.layer_types]
    )
    writer.add_rope_freq_base(full["rope_theta"])
    writer.add_float32("gemma3.rope.freq_base_swa", local["rope_theta"])
    if full["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(full["factor"])
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    assert source.folder is not None
    gguf_tokenizer.write(writer, source.folder, config)


def _file_type(types: Mapping[str, Type]) -> LlamaFileType:
    kinds = set(types.values())
    if Type.IQ4_NL in kinds:
        return LlamaFileType.MOSTLY_IQ4_NL
    if Type.Q4_0 in kinds:
        return LlamaFileType.MOSTLY_Q4_0
    if Type.Q8_0 in kinds:
        return LlamaFileType.MOSTLY_Q8_0
    return LlamaFileType.MOSTLY_BF16 if Type.BF16 in kinds else LlamaFileType.ALL_F32
