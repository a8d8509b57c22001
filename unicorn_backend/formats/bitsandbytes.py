"""bitsandbytes checkpoints: NF4 and FP4 in blocks, with and without quantized scales, and LLM.int8() rows.

    weight                            bytes q[0] << 4 | q[1], q[2] << 4 | q[3], ... of the flattened [N, K]
    weight.quant_map                  fp32 [16], the values that q stands for, within -1..1
    weight.absmax                     fp32 [blocks], or uint8 [blocks] ("double quantization"), then also
    weight.nested_absmax, .nested_quant_map    fp32: absmax = quant_map[byte] * nested_absmax[block of blocks] + offset
    weight.quant_state.bitsandbytes__nf4       JSON as bytes: shape, blocksize, nested_blocksize, nested_offset

    weight, SCB                       int8 [N, K], fp32 [N]: value = weight * SCB / 127

Four-bit indices are taken over into w4n32 as they are. Its table is INT8 and its scales are fp16, so the values are
close and not the same: NF4's of normally distributed weights come back with 46.5 dB, quantizing them again to four bits
would leave some 22. INT8 rows are exactly w8c's.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unicorn_backend.errors import CheckpointError
from unicorn_backend.formats.safetensors import StoredTensor
from unicorn_backend.layouts import GROUP, W8_ZERO, pack_nibbles, pack_w8

METHOD = "bitsandbytes"
BLOCKS = tuple(1 << i for i in range(5, 13))  # 32 to 4096, those that bitsandbytes has
_STATE = ".quant_state.bitsandbytes__"
_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_INVERSE = 1.0 / 127.0
_BEST_FACTOR = (64.0, 127.0, 505)  # tried: every eighth


@dataclass(frozen=True)
class Int8Tensor(StoredTensor):
    """LLM.int8() rows: value = integer * scale / 127."""

    integers: StoredTensor | None = None
    scales: StoredTensor | None = None

    @property
    def scheme(self) -> str | None:
        return "w8c"

    @property
    def type_name(self) -> str:
        return "bitsandbytes INT8"

    @property
    def nbytes(self) -> int:
        return self.numel + self.shape[0] * 4

    @property
    def row_bytes(self) -> int:
        return self.shape[1] + 4

    def read(self, first: int = 0, last: int | None = None) -> Tensor:
        k = self.shape[1]
        last = self.numel if last is None else last
        return self.rows(first // k, -(-last // k)).view(-1)[first % k :][: last - first]

    def rows(self, first: int, last: int) -> Tensor:
        q, s = self._parts(first, last)
        return q.float() * s[:, None]

    def packed_rows(self, first: int, last: int) -> list[Tensor]:
        q, s = self._parts(first, last)
        return pack_w8((q.to(torch.int16) + W8_ZERO).to(torch.uint8), s)

    def _parts(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        assert self.integers is not None and self.scales is not None
        return self.integers.rows(first, last), self.scales.read(first, last) * _INVERSE


@dataclass(frozen=True)
class FourBitTensor(StoredTensor):
    """A weight [N, K] in 4-bit blocks. `offset` is that of the indices; `kept` is what holds them."""

    block: int = 64
    kind: str = "nf4"
    kept: str | None = None
    table: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(16), compare=False)
    absmax: StoredTensor | None = None
    nested: Nested | None = None

    @property
    def scheme(self) -> str | None:
        return self.kept

    @property
    def exact(self) -> bool:
        return False

    def dequantized(self) -> StoredTensor:
        return dataclasses.replace(self, kept=None)

    @property
    def type_name(self) -> str:
        return self.kind.upper()

    @property
    def nbytes(self) -> int:
        assert self.absmax is not None
        return self.numel // 2 + self.absmax.nbytes

    @property
    def row_bytes(self) -> int:
        return self.nbytes // self.shape[0]

    def read(self, first: int = 0, last: int | None = None) -> Tensor:
        last = self.numel if last is None else last
        values = self.table[self._indices(first, last).long()]
        return values * self._scales(first, last).repeat_interleave(self.block)[first % self.block :][: last - first]

    def rows(self, first: int, last: int) -> Tensor:
        k = self.shape[1]
        return self.read(first * k, last * k).view(last - first, k)

    def packed_rows(self, first: int, last: int) -> list[Tensor]:
        k, (table, factor) = self.shape[1], nearest_table(self.table)
        q = self._indices(first * k, last * k).view(last - first, k)
        scales = (self._scales(first * k, last * k) / factor).repeat_interleave(self.block // GROUP)
        skipped = first * k % self.block // GROUP  # a row may begin inside a block
        groups = scales[skipped:][: q.numel() // GROUP].view(last - first, -1)
        return [*pack_nibbles(q, groups.half()), table]

    def _indices(self, first: int, last: int) -> Tensor:
        """uint8 in 0..15 of elements first..last-1."""
        stored = StoredTensor(self.name, torch.uint8, (self.numel // 2,), self.file, self.offset)
        data = stored.read(first // 2, -(-last // 2))
        return torch.stack((data >> 4, data & 15), dim=1).view(-1)[first % 2 :][: last - first]

    def _scales(self, first: int, last: int) -> Tensor:
        """fp32, of the blocks that hold elements first..last-1."""
        assert self.absmax is not None
        first, last = first // self.block, -(-last // self.block)
        absmax = self.absmax.read(first, last)
        return absmax if self.nested is None else self.nested.scales(absmax, first)


@dataclass(frozen=True)
class Nested:
    """How scales are quantized: scale = table[byte] * absmax[block] + offset."""

    block: int
    offset: float
    table: Tensor  # fp32 [256]
    absmax: Tensor  # fp32 [blocks]

    def scales(self, stored: Tensor, first: int) -> Tensor:
        """fp32 of the bytes with the numbers first, first + 1, ..."""
        blocks = torch.arange(first, first + len(stored)) // self.block
        return self.table[stored.long()] * self.absmax[blocks] + self.offset


def nearest_table(values: Tensor) -> tuple[Tensor, float]:
    """(int8 [16], factor): the integers whose share of the factor is nearest to fp32 [16] within -1..1.

    Of equal weight; weighing NF4's by how frequent they are in normally distributed weights gains less than 0.1 dB.
    """
    factors = torch.linspace(*_BEST_FACTOR)[:, None].double()
    integers = (values.double() * factors).round()
    dots = (integers * values.double()).sum(1)
    squares = integers.square().sum(1)
    best = int((dots.square() / squares.clamp_min(1)).argmax())  # the least error left by the best factor for each
    factor = float(squares[best] / dots[best]) if squares[best] > 0 else 1.0
    return integers[best].to(torch.int8), factor


def merge(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint with each quantized weight in one. CheckpointError for what is not read."""
    merged: dict[str, StoredTensor] = {}
    states = {name.partition(_STATE)[0]: name for name in tensors if _STATE in name}
    for name, tensor in tensors.items():
        if name in states:
            merged[name] = _four_bits(name, tensor, states[name], tensors)
        elif name.endswith(".weight") and tensor.dtype == torch.int8:
            merged[name] = _int8(name, tensor, tensors)
        elif not (_STATE in name or name.endswith((".SCB", ".weight_format", *_PARTS))):
            merged[name] = tensor
    return merged


def _int8(name: str, integers: StoredTensor, tensors: Mapping[str, StoredTensor]) -> Int8Tensor:
    scales = _part(tensors, f"{name.removesuffix('weight')}SCB", integers, (torch.float32,))
    if len(integers.shape) != 2 or 0 in integers.shape or scales.shape != integers.shape[:1]:
        raise _wrong(integers, f"{list(integers.shape)} with SCB {list(scales.shape)} is no INT8 weight")
    return Int8Tensor(name, torch.float32, integers.shape, integers.file, integers.offset, integers, scales)


def _four_bits(name: str, stored: StoredTensor, state_name: str, tensors: Mapping[str, StoredTensor]) -> FourBitTensor:
    state = _read_state(tensors[state_name])
    shape, block = state.get("shape"), state.get("blocksize")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and 0 < n < 1 << 40 for n in shape):
        raise _wrong(tensors[state_name], f"has the shape {shape!r}, not two sizes")
    if block not in BLOCKS or type(block) is not int:
        raise _wrong(tensors[state_name], f"has the blocksize {block!r}, known are {', '.join(map(str, BLOCKS))}")
    numel = math.prod(shape)
    if numel % 2 or stored.nbytes != numel // 2:
        raise _wrong(stored, f"has {stored.nbytes} bytes, not {numel / 2:g} for {shape} in 4 bits")
    absmax = _part(tensors, f"{name}.absmax", stored, (torch.float32, torch.uint8))
    if absmax.numel != -(-numel // block):
        raise _wrong(absmax, f"has {absmax.numel} scales, not one for each {block} of {numel} weights")
    nested = _nested(name, state, absmax, tensors) if absmax.dtype == torch.uint8 else None
    table = _table(tensors, f"{name}.quant_map", stored, 16)
    if table.abs().max() > 1:
        raise _wrong(tensors[f"{name}.quant_map"], "holds values outside of -1..1")
    return FourBitTensor(
        name, torch.float32, tuple(shape), stored.file, stored.offset, block, state_name.rpartition("__")[2],
        "w4n32" if shape[1] % GROUP == 0 else None, table, absmax, nested,
    )  # fmt: skip


def _read_state(stored: StoredTensor) -> dict[str, Any]:
    if stored.dtype != torch.uint8:
        raise _wrong(stored, f"is {stored.dtype}, not JSON in bytes")
    try:
        state = json.loads(stored.read().numpy().tobytes())
    except (ValueError, RecursionError) as error:
        raise _wrong(stored, f"is no JSON: {error}") from error
    if not isinstance(state, dict):
        raise _wrong(stored, "is no JSON object")
    return state


def _nested(name: str, state: dict[str, Any], absmax: StoredTensor, tensors: Mapping[str, StoredTensor]) -> Nested:
    block, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if type(block) is not int or block < 1 or not isinstance(offset, (int, float)) or not math.isfinite(offset):
        raise _wrong(absmax, f"is quantized with nested_blocksize {block!r} and nested_offset {offset!r}")
    blocks = -(-absmax.numel // block)
    return Nested(
        block,
        float(offset),
        _table(tensors, f"{name}.nested_quant_map", absmax, 256),
        _table(tensors, f"{name}.nested_absmax", absmax, blocks),
    )


def _table(tensors: Mapping[str, StoredTensor], name: str, beside: StoredTensor, count: int) -> Tensor:
    stored = _part(tensors, name, beside, (torch.float32,))
    if stored.numel != count:
        raise _wrong(stored, f"has {stored.numel} values, not {count}")
    values = stored.read()
    if not torch.isfinite(values).all():
        raise _wrong(stored, "holds NaN or Inf")
    return values


def _part(
    tensors: Mapping[str, StoredTensor], name: str, beside: StoredTensor, dtypes: tuple[torch.dtype, ...]
) -> StoredTensor:
    stored = tensors.get(name)
    if stored is None:
        raise CheckpointError(f"{beside.file}: tensor {beside.name!r} has no {name} beside it")
    if stored.dtype not in dtypes:
        raise _wrong(stored, f"is {stored.dtype}, not {' or '.join(map(str, dtypes))}")
    return stored


def _wrong(tensor: StoredTensor, what: str) -> CheckpointError:
    return CheckpointError(
        f"{tensor.file}: tensor {tensor.name!r} {what}: damaged, or not what bitsandbytes writes; "
        "copy or download it again"
    )
