"""GGUF out: one file that llama.cpp runs, with the values of every scheme that has a type there.

The blocks hold what our searches found, so a file written here has the size of llama.cpp's own and less error. w8c and
w8a become Q8_0, with a scale per 32 weights instead of one per row. k-quants are blocks of 256 columns; a weight of
another width becomes what llama.cpp makes it. Norms are fp32, as llama.cpp wants.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import dequantize, quantize
from torch import Tensor
from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

from unicorn_backend.errors import CheckpointError
from unicorn_backend.formats import gguf_metadata, gguf_tokenizer
from unicorn_backend.formats.safetensors import StoredTensor
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
from unicorn_backend.layouts import (
    GROUP,
    ROWS,
    SUPER,
    W4_ZERO,
    unpack_kquant,
    unpack_w4g32,
    unpack_w4m32,
    unpack_w8g32,
)
from unicorn_backend.quantize.recipe import FLOAT

if TYPE_CHECKING:
    from unicorn_backend.quantize.skeleton import Skeleton
    from unicorn_backend.quantize.source import Source

FILE = "model.gguf"
ALIGNMENT = 32
Type = GGMLQuantizationType
_TYPES = {
    "w4g32": Type.Q4_0, "w4n32": Type.IQ4_NL, "w4m32": Type.Q4_1, "q4k": Type.Q4_K, "q5k": Type.Q5_K,
    "q6k": Type.Q6_K, "w8g32": Type.Q8_0, "w8c": Type.Q8_0, "w8a": Type.Q8_0,
}  # fmt: skip
# For rows that are no multiple of 256 (llama.cpp's tensor_type_fallback).
_NARROW = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}
_FLOATS = {torch.float32: Type.F32, torch.float16: Type.F16, torch.bfloat16: Type.BF16}


class GgufOut:
    """A text model as `model.gguf`."""

    name = "gguf"

    def __init__(self, source: Source, model: Skeleton) -> None:
        self._source = source
        self._architecture = gguf_metadata.architecture(source)
        names = get_gguf_hf_weights_map(model.model, TensorProcessor(), self._architecture)
        self._names: dict[str, str] = {hf: gguf for gguf, hf in names.items()}
        self._names[gguf_metadata.ROPE_FREQS] = gguf_metadata.ROPE_FREQS
        self._types: dict[str, Type] = {}
        self._columns: dict[str, int] = {}

    def together(self, name: str) -> int:
        """llama.cpp wants the two halves of each head of Llama's q and k interleaved."""
        rotated = self._architecture == "llama" and (".q_proj." in name or ".k_proj." in name)
        return gguf_metadata.head_dim(self._source.config) if rotated else 1

    def computed(self) -> list[StoredTensor]:
        return gguf_metadata.computed(self._source)

    def label(self, shape: tuple[int, ...], scheme: str) -> str:
        return FLOAT if scheme == FLOAT else str(type_of(scheme, shape).name)

    def outputs(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], scheme: str) -> Declared:
        if scheme != FLOAT and shape[1] % GROUP:
            raise CheckpointError(f"{name}: {shape[1]} columns are no multiple of {GROUP}, which GGUF blocks need")
        kind = type_of(scheme, shape) if scheme != FLOAT else Type.F32 if len(shape) == 1 else _FLOATS[dtype]
        elements, size = GGML_QUANT_SIZES[kind]
        renamed = self._renamed(name)
        self._types[renamed] = kind
        self._columns[name] = shape[-1] if len(shape) > 1 else 1
        return {renamed: (torch.uint8, (*shape[:-1], shape[-1] // elements * size))}

    def encode(
        self,
        name: str,
        shape: tuple[int, ...],
        scheme: str,
        first: int,
        rows: Rows,
        importance: Tensor | None = None,
    ) -> tuple[list[Encoded], Noise]:
        renamed = self._renamed(name)
        if scheme == FLOAT:
            assert isinstance(rows, Tensor)
            values = rows.float() + self._offset(renamed) if len(shape) == 1 else rows
            return [(renamed, first * values.element_size(), self._interleaved(name, values))], LOSSLESS
        kind = type_of(scheme, shape)
        if kind != _TYPES[scheme] and kind != Type.Q8_0:
            data, noise = _by_package(rows, kind)
        elif scheme in ("w8c", "w8a") or kind != _TYPES[scheme]:
            data, noise = _q8_0(rows)
        else:
            data, noise = _same_values(rows, scheme, importance)
        data = self._interleaved(name, data[: shape[0] - first])
        return [(renamed, first * data.shape[1], data)], noise

    def layout(self, declared: Declared, shard_bytes: int) -> Layout:
        writer = GGUFWriter(path=None, arch=self._architecture)
        gguf_metadata.write(writer, self._source)
        writer.add_file_type(_file_type(self._types))
        if self._source.folder is not None:
            gguf_tokenizer.write(writer, self._source.folder, self._source.config)
        else:
            assert self._source.gguf is not None
            gguf_tokenizer.copy(writer, self._source.gguf)
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

    def _interleaved(self, name: str, rows: Tensor) -> Tensor:
        """Whole heads of rows (or flattened elements) in the order that the file has."""
        if (head := self.together(name)) == 1:
            return rows
        halves = rows.view(-1, 2, head // 2, rows.shape[1] if rows.dim() == 2 else self._columns[name])
        return halves.transpose(1, 2).reshape(rows.shape)

    def _offset(self, renamed: str) -> float:
        """Gemma multiplies with 1 + weight, llama.cpp with what is in the file."""
        return 1.0 if self._architecture.startswith("gemma") and "norm.weight" in renamed else 0.0

    def _renamed(self, name: str) -> str:
        if name not in self._names:
            raise CheckpointError(f"{name}: GGUF has no name for it")
        return self._names[name]


def type_of(scheme: str, shape: tuple[int, ...]) -> Type:
    kind = _TYPES[scheme]
    return _NARROW[kind] if shape[1] % GGML_QUANT_SIZES[kind][0] else kind


def _same_values(rows: Rows, scheme: str, importance: Tensor | None) -> tuple[Tensor, Noise]:
    """Blocks with the values that the scheme gives."""
    packed, noise = packed_with_noise(rows, scheme, importance)
    return _WRITERS[scheme](packed), noise


def _by_package(rows: Rows, kind: Type) -> tuple[Tensor, Noise]:
    """Blocks of a type that has no scheme here, by the gguf package (llama.cpp's bits)."""
    assert isinstance(rows, Tensor)
    if not torch.isfinite(rows).all():
        raise ValueError("NaN or Inf")
    x = rows.float().numpy()
    data = quantize(x, kind)
    return torch.from_numpy(data), (squares(rows.float()), squares(torch.from_numpy(x - dequantize(data, kind))))


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


def to_q4_1(packed: list[Tensor]) -> Tensor:
    """w4m32 -> Q4_1 rows uint8 [16 * N16, K32 * 20]; the inverse of `repack_q4_1`."""
    w, s, m = packed
    n, k32 = w.shape[0] * ROWS, w.shape[1]
    q, scales, minima = unpack_w4m32(w, s, m, n, k32 * GROUP)
    nibbles = q.view(n, k32, 2, 16)
    rest = torch.cat((_bytes(minima[..., None]), nibbles[:, :, 0] | (nibbles[:, :, 1] << 4)), dim=-1)
    return _blocks(scales, rest)


def to_q4_k(packed: list[Tensor]) -> Tensor:
    """q4k -> Q4_K rows uint8 [16 * N16, K256 * 144]; the inverse of `repack_q4_k`."""
    q, head = _affine_super(packed)
    return torch.cat((head, _two_groups(q)), dim=-1).flatten(1)


def to_q5_k(packed: list[Tensor]) -> Tensor:
    """q5k -> Q5_K rows uint8 [16 * N16, K256 * 176]; the inverse of `repack_q5_k`."""
    q, head = _affine_super(packed)
    shifts = torch.arange(SUPER, dtype=torch.uint8)[:, None]
    high = ((q >> 4) << shifts).sum(2, dtype=torch.uint8)
    return torch.cat((head, high, _two_groups(q & 15)), dim=-1).flatten(1)


def to_q6_k(packed: list[Tensor]) -> Tensor:
    """q6k -> Q6_K rows uint8 [16 * N16, K256 * 210]; the inverse of `repack_q6_k`."""
    n, blocks = packed[0].shape[0] * ROWS, packed[2].shape[1]
    q, pairs, supers = unpack_kquant(packed, n)
    halves = (q & 15).view(n, blocks, 2, 2, 64)
    low = halves[:, :, :, 0] | (halves[:, :, :, 1] << 4)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
    high = ((q >> 4).view(n, blocks, 2, 4, 32) << shifts).sum(3, dtype=torch.uint8)
    parts = (low.flatten(2), high.flatten(2), pairs.reshape(n, blocks, -1).view(torch.uint8), _bytes(supers))
    return torch.cat(parts, dim=-1).flatten(1)


_WRITERS: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "w4g32": to_q4_0, "w4n32": to_q4_0, "w4m32": to_q4_1, "w8g32": to_q8_0,
    "q4k": to_q4_k, "q5k": to_q5_k, "q6k": to_q6_k,
}  # fmt: skip


def _affine_super(packed: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Of q4k or q5k: integers uint8 [n, blocks, 8, 32], and what a block begins with, uint8 [n, blocks, 16]."""
    n, blocks = packed[0].shape[0] * ROWS, packed[2].shape[1]
    q, pairs, supers = unpack_kquant(packed, n)
    s, m = pairs.view(n, blocks, SUPER, 2).unbind(-1)
    first, last = slice(0, 4), slice(4, 8)
    a, b = (part[..., first] | (part[..., last] >> 4 << 6) for part in (s, m))
    c = (s[..., last] & 15) | ((m[..., last] & 15) << 4)
    return q.view(n, blocks, SUPER, GROUP), torch.cat((_bytes(supers), a, b, c), dim=-1)


def _two_groups(q: Tensor) -> Tensor:
    """[n, blocks, 8, 32] in 0..15 -> [n, blocks, 4 * 32], two groups a byte."""
    pairs = q.view(*q.shape[:2], 4, 2, GROUP)
    return (pairs[:, :, :, 0] | (pairs[:, :, :, 1] << 4)).flatten(2)


def _bytes(x: Tensor) -> Tensor:
    """fp16 [..., count] -> uint8 [..., 2 * count]."""
    return x.flatten().view(torch.uint8).view(*x.shape[:-1], -1)


def _blocks(scales: Tensor, rest: Tensor) -> Tensor:
    """fp16 [n, groups] before uint8 [n, groups, bytes], as rows."""
    return torch.cat((_bytes(scales[..., None]), rest), dim=-1).view(scales.shape[0], -1)


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


def _file_type(types: Mapping[str, Type]) -> LlamaFileType:
    """What most matrices of the layers are."""
    layers = Counter(kind for name, kind in types.items() if name.startswith("blk.") and "norm" not in name)
    return _FILE_TYPES.get(layers.most_common(1)[0][0], LlamaFileType.MOSTLY_BF16)


_FILE_TYPES = {
    Type.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    Type.Q4_1: LlamaFileType.MOSTLY_Q4_1,
    Type.IQ4_NL: LlamaFileType.MOSTLY_IQ4_NL,
    Type.Q4_K: LlamaFileType.MOSTLY_Q4_K_M,
    Type.Q5_0: LlamaFileType.MOSTLY_Q5_0,
    Type.Q5_K: LlamaFileType.MOSTLY_Q5_K_M,
    Type.Q6_K: LlamaFileType.MOSTLY_Q6_K,
    Type.Q8_0: LlamaFileType.MOSTLY_Q8_0,
    Type.BF16: LlamaFileType.MOSTLY_BF16,
    Type.F16: LlamaFileType.MOSTLY_F16,
    Type.F32: LlamaFileType.ALL_F32,
}
