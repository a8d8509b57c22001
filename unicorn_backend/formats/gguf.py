"""GGUF files: a reader that checks everything before it believes it, and blocks of some types in our tiles.

The gguf package describes the types and dequantizes them, transformers maps names, configs and tokenizers.
Both trust the file, so `read_header` walks it first: every count, length, offset and type is checked
against the size of the file.

    "GGUF", version, number of tensors, number of metadata entries
    metadata entries: key, type, value
    tensor entries: name, dimensions (fastest first), type, offset in the data
    data, aligned: the tensors, without overlap
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize
from torch import Tensor

from unicorn_backend.errors import CheckpointError
from unicorn_backend.formats.safetensors import StoredTensor, read_exactly
from unicorn_backend.layouts import pack_kquant, pack_nibbles, pack_w4m32, pack_w4n32, pack_w8g32

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_NESTING = 3  # arrays of arrays; no file in use has any
MAX_DIMENSIONS = 4
FLOATS = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
_SIZES = {
    GGUFValueType.UINT8: 1, GGUFValueType.INT8: 1, GGUFValueType.BOOL: 1, GGUFValueType.UINT16: 2,
    GGUFValueType.INT16: 2, GGUFValueType.UINT32: 4, GGUFValueType.INT32: 4, GGUFValueType.FLOAT32: 4,
    GGUFValueType.UINT64: 8, GGUFValueType.INT64: 8, GGUFValueType.FLOAT64: 8,
}  # fmt: skip


@dataclass(frozen=True)
class GgufTensor(StoredTensor):
    """A tensor of a GGUF file. `dtype` is that of its values when read, `type` how they are stored.

    offset_values: added to the values while reading (Gemma's norms are stored as weight + 1).
    row_order: which stored row each row of the weight is; None: the same.
    """

    type: GGMLQuantizationType = GGMLQuantizationType.F32
    offset_values: float = 0.0
    row_order: Tensor | None = field(default=None, compare=False)

    @property
    def nbytes(self) -> int:
        elements, size = GGML_QUANT_SIZES[self.type]
        return self.numel // elements * size

    @property
    def row_bytes(self) -> int:
        return self.nbytes // (self.numel // self.shape[-1])

    @property
    def scheme(self) -> str | None:
        """The scheme that holds the same values, if there is one."""
        return _EXACT[self.type][0] if self.type in _EXACT and len(self.shape) == 2 else None

    @property
    def type_name(self) -> str:
        return "" if self.type in FLOATS else str(self.type.name)

    def read(self, first: int = 0, last: int | None = None) -> Tensor:
        """Elements first..last-1 of the flattened tensor; for block types only whole rows."""
        last = self.numel if last is None else last
        stored = StoredTensor(self.name, FLOATS.get(self.type, torch.uint8), self.shape, self.file, self.offset)
        if self.type in FLOATS and self.row_order is None:
            values = stored.read(first, last)
        elif self.type in FLOATS and self.row_order is not None and len(self.shape) == 1:  # a bias
            values = stored.read()[self.row_order[first:last]]
        else:
            k = self.shape[-1]
            values = self._values(self._blocks(first // k, -(-last // k)))[first % k :][: last - first]
        return (values.float() + self.offset_values).to(self.dtype) if self.offset_values else values.to(self.dtype)

    def rows(self, first: int, last: int) -> Tensor:
        return self.read(first * self.shape[1], last * self.shape[1]).view(last - first, self.shape[1])

    def packed_rows(self, first: int, last: int) -> list[Tensor]:
        """Rows first..last-1 in the layout of `scheme`, with exactly the stored values."""
        return _EXACT[self.type][1](self._blocks(first, last))

    def _blocks(self, first: int, last: int) -> Tensor:
        """The bytes of rows first..last-1, uint8 [rows, row_bytes]."""
        data = torch.empty(last - first, self.row_bytes, dtype=torch.uint8)
        if self.row_order is None:
            read_exactly(self.file, self.offset + first * self.row_bytes, data.view(-1), self.name)
        else:
            for i, row in enumerate(self.row_order[first:last].tolist()):
                read_exactly(self.file, self.offset + row * self.row_bytes, data[i], self.name)
        return data

    def _values(self, blocks: Tensor) -> Tensor:
        if self.type in FLOATS:
            return blocks.view(-1).view(FLOATS[self.type])
        values: Tensor = torch.from_numpy(dequantize(blocks.numpy(), self.type))
        return values.view(-1)


def repack_q4_0(blocks: Tensor) -> list[Tensor]:
    """Q4_0 rows uint8 [n, k / 32 * 18] -> w4g32 [w, s] with the same values.

    A block is an fp16 scale and 16 bytes: the low nibbles are columns 0..15, the high ones 16..31.
    """
    return pack_nibbles(*_nibbles(blocks))


def repack_iq4_nl(blocks: Tensor) -> list[Tensor]:
    """IQ4_NL rows, laid out as Q4_0's -> w4n32 [w, s, c] with the same values."""
    return pack_w4n32(*_nibbles(blocks))


def repack_q8_0(blocks: Tensor) -> list[Tensor]:
    """Q8_0 rows uint8 [n, k / 32 * 34] -> w8g32 [w, s] with the same values. A block: an fp16 scale and 32 int8."""
    n = blocks.shape[0]
    groups = blocks.view(n, -1, 34)
    return pack_w8g32(groups[..., 2:].reshape(n, -1).view(torch.int8), _scales(groups))


def _nibbles(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [n, k] in 0..15 and fp16 scales [n, k / 32] of blocks of 18 bytes."""
    n = blocks.shape[0]
    groups = blocks.view(n, -1, 18)
    halves = groups[..., 2:]
    return torch.cat((halves & 15, halves >> 4), dim=-1).view(n, -1), _scales(groups)


def _scales(groups: Tensor) -> Tensor:
    return groups[..., :2].contiguous().view(torch.float16)[..., 0]


def repack_q4_1(blocks: Tensor) -> list[Tensor]:
    """Q4_1 rows uint8 [n, k / 32 * 20] -> w4m32 [w, s, m] with the same values: fp16 scale, fp16 minimum, nibbles."""
    n = blocks.shape[0]
    groups = blocks.view(n, -1, 20)
    halves = groups[..., 4:]
    q = torch.cat((halves & 15, halves >> 4), dim=-1).view(n, -1)
    return pack_w4m32(q, _scales(groups), _scales(groups[..., 2:]))


def repack_q4_k(blocks: Tensor) -> list[Tensor]:
    """Q4_K rows uint8 [n, k / 256 * 144] -> q4k with the same values.

    A block: fp16 d and dmin, 12 bytes of 6-bit scales and minima, and 4 times 32 bytes with two groups of 32 each, one
    in the low nibbles and one in the high ones.
    """
    supers, pairs, rest = _super_block(blocks, 144)
    return pack_kquant(_two_groups(rest), pairs, supers, 4)


def repack_q5_k(blocks: Tensor) -> list[Tensor]:
    """Q5_K rows uint8 [n, k / 256 * 176] -> q5k: as Q4_K, with 32 bytes before the nibbles whose bit i belongs to
    group i."""
    supers, pairs, rest = _super_block(blocks, 176)
    bits = torch.arange(8, dtype=torch.uint8)[:, None]
    high = (rest[:, :, None, :32] >> bits) & 1  # [n, blocks, group, column]
    q = _two_groups(rest[..., 32:]) | (high.reshape(blocks.shape[0], -1) << 4)
    return pack_kquant(q, pairs, supers, 5)


def repack_q6_k(blocks: Tensor) -> list[Tensor]:
    """Q6_K rows uint8 [n, k / 256 * 210] -> q6k with the same values.

    A block: 128 bytes of nibbles, 64 bytes of bits 4 and 5, 16 int8 scales, fp16 d. Each half (128 columns) has 64 and
    32 of the bytes; its columns 0..63 are the low nibbles, and bits 2 i and 2 i + 1 of the 32 belong to column 32 i.
    """
    n = blocks.shape[0]
    super_blocks = blocks.view(n, -1, 210)
    low = super_blocks[..., :128].reshape(n, -1, 2, 1, 64)
    nibbles = torch.cat((low & 15, low >> 4), dim=3)  # [n, blocks, half, 2, 64]
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
    high = (super_blocks[..., 128:192].reshape(n, -1, 2, 1, 32) >> shifts) & 3
    q = nibbles.reshape(n, -1) | (high.reshape(n, -1) << 4)
    pairs = super_blocks[..., 192:208].reshape(n, -1, 2).view(torch.int8)
    return pack_kquant(q, pairs, _scales(super_blocks[..., 208:])[..., None], 6)


def _super_block(blocks: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """fp16 [n, blocks, 2], uint8 (scale, minimum) [n, groups, 2], and what follows, of Q4_K and Q5_K."""
    n = blocks.shape[0]
    super_blocks = blocks.view(n, -1, size)
    supers = super_blocks[..., :4].contiguous().view(torch.float16)
    a, b, c = super_blocks[..., 4:16].unflatten(-1, (3, 4)).unbind(2)
    scales = torch.cat((a & 63, (c & 15) | (a >> 6 << 4)), dim=-1)
    minima = torch.cat((b & 63, (c >> 4) | (b >> 6 << 4)), dim=-1)
    return supers, torch.stack((scales, minima), dim=-1).view(n, -1, 2), super_blocks[..., 16:]


def _two_groups(nibbles: Tensor) -> Tensor:
    """[n, blocks, 4 * 32] -> [n, columns]."""
    pairs = nibbles.reshape(*nibbles.shape[:2], 4, 1, 32)
    return torch.cat((pairs & 15, pairs >> 4), dim=3).reshape(nibbles.shape[0], -1)


# Stored type -> the scheme with the same values, and how its rows become that.
_EXACT: dict[GGMLQuantizationType, tuple[str, Callable[[Tensor], list[Tensor]]]] = {
    GGMLQuantizationType.Q4_0: ("w4g32", repack_q4_0),
    GGMLQuantizationType.IQ4_NL: ("w4n32", repack_iq4_nl),
    GGMLQuantizationType.Q8_0: ("w8g32", repack_q8_0),
    GGMLQuantizationType.Q4_1: ("w4m32", repack_q4_1),
    GGMLQuantizationType.Q4_K: ("q4k", repack_q4_k),
    GGMLQuantizationType.Q5_K: ("q5k", repack_q5_k),
    GGMLQuantizationType.Q6_K: ("q6k", repack_q6_k),
}


@dataclass(frozen=True)
class GgufHeader:
    """architecture: `general.architecture`; tensors by the name in the file."""

    path: Path
    architecture: str
    tensors: dict[str, GgufTensor]
    keys: tuple[str, ...]


def read_header(path: Path) -> GgufHeader:
    """Check a GGUF file and list its tensors. CheckpointError, naming file and tensor, for anything odd."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Walk(path, data).header()
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


class _Walk:
    """Reads the file from front to back; `self.at` never passes the end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at, self.size = path, data, 0, len(data)

    def header(self) -> GgufHeader:
        if self.take(4, "magic") != MAGIC:
            raise self.bad("does not begin with GGUF")
        version = self.number("<I", "version")
        if version not in VERSIONS:
            raise self.bad(f"version {version}, known are {VERSIONS} in little-endian")
        tensor_count = self.count(32, "tensors")
        entries = self.metadata(self.count(13, "metadata entries"))
        architecture, alignment = entries["general.architecture"], entries["general.alignment"]
        if not isinstance(architecture, str):
            raise self.bad("no general.architecture")
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1) or alignment > 1 << 20:
            raise self.bad(f"general.alignment is {alignment!r}, not a power of two from 8 on")
        found = [self.tensor() for _ in range(tensor_count)]
        tensors = self.placed(found, -(-self.at // alignment) * alignment, alignment)
        return GgufHeader(self.path, architecture, tensors, tuple(entries))

    def metadata(self, count: int) -> dict[str, Any]:
        """Every key; the value of the two that matter here."""
        entries: dict[str, Any] = {}
        for _ in range(count):
            key = self.string("a metadata key")
            if key in entries:
                raise self.bad(f"metadata key {key!r} twice")
            entries[key] = self.value(self.value_type(key), key, 0)
        return {"general.architecture": None, "general.alignment": 32} | entries

    def value(self, kind: GGUFValueType, key: str, depth: int) -> Any:
        """The value if it is a string or an uint32, else None."""
        if kind == GGUFValueType.STRING:
            return self.string(key)
        if kind == GGUFValueType.UINT32:
            return self.number("<I", key)
        if kind != GGUFValueType.ARRAY:
            self.take(_SIZES[kind], key)
            return None
        inner = self.value_type(key)
        if depth == MAX_NESTING:
            raise self.bad(f"arrays in arrays in metadata {key!r}")
        count = self.count(_SIZES.get(inner, 8), f"elements of {key!r}")
        if inner in _SIZES:
            self.take(count * _SIZES[inner], key)
        else:
            for _ in range(count):
                self.value(inner, key, depth + 1)
        return None

    def tensor(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name = self.string("a tensor name")
        dimensions = self.number("<I", name)
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self.bad(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self.number("<Q", name) for _ in range(dimensions))[::-1]
        kind = self.number("<I", name)
        if kind not in list(GGMLQuantizationType):
            raise self.bad(f"tensor {name!r} has the unknown type {kind}")
        return name, shape, GGMLQuantizationType(kind), self.number("<Q", name)

    def placed(
        self, entries: list[tuple[str, tuple[int, ...], GGMLQuantizationType, int]], start: int, alignment: int
    ) -> dict[str, GgufTensor]:
        """The tensors, if each lies in the file and no two overlap."""
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in entries:
            if name in tensors:
                raise self.bad(f"tensor {name!r} twice")
            elements, size = GGML_QUANT_SIZES[kind]
            if 0 in shape or shape[-1] % elements:
                raise self.bad(f"tensor {name!r} of {kind.name} has shape {list(shape)}")
            if math.prod(shape) // elements * size > self.size:
                raise self.bad(f"tensor {name!r} of {kind.name} {list(shape)} is larger than the file")
            if offset % alignment:
                raise self.bad(f"tensor {name!r} is at {offset}, not a multiple of {alignment}")
            dtype = FLOATS.get(kind, torch.float32)
            tensors[name] = GgufTensor(name, dtype, shape, self.path, start + offset, kind)
        end = start
        for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
            if tensor.offset < end:
                raise self.bad(f"tensor {tensor.name!r} overlaps another")
            end = tensor.offset + tensor.nbytes
            if end > self.size:
                raise self.bad(f"ends inside tensor {tensor.name!r}: cut short, copy or download it again")
        return tensors

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.at:
            raise self.bad(f"ends inside {what}: cut short, copy or download it again")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str, what: str) -> int:
        value: int = struct.unpack(form, self.take(struct.calcsize(form), what))[0]
        return value

    def count(self, least_bytes: int, what: str) -> int:
        """A count of things that take at least `least_bytes` each."""
        value = self.number("<Q", what)
        if value > (self.size - self.at) // least_bytes:
            raise self.bad(f"{value} {what} do not fit into the file")
        return value

    def string(self, what: str) -> str:
        data = self.take(self.number("<Q", what), what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.bad(f"{what} is not UTF-8") from error

    def value_type(self, key: str) -> GGUFValueType:
        kind = self.number("<I", key)
        if kind not in list(GGUFValueType):
            raise self.bad(f"metadata {key!r} has the unknown type {kind}")
        return GGUFValueType(kind)

    def bad(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: not a usable GGUF file: {what}")
