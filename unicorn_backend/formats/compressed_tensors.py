"""compressed-tensors in and out: INT4 in groups and INT8 per row, the "pack-quantized" format of vLLM's tools.

    weight_packed  int32 [N, K * bits / 32], value + 2^(bits-1), the first column in the lowest bits
    weight_scale   [N, groups], groups of K / groups columns; one group: a scale per row
    weight_shape   int64 [2]

An INT8 weight may also be a plain int8 `weight` [N, K] beside its scale ("int-quantized").
What a weight is follows from its tensors, not from config.json.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unicorn_backend.errors import CheckpointError
from unicorn_backend.formats.safetensors import StoredTensor
from unicorn_backend.formats.target import (
    LOSSLESS,
    Declared,
    Encoded,
    Layout,
    Noise,
    Rows,
    copied,
    sharded,
    squares,
    write_config,
)
from unicorn_backend.layouts import GROUP, ROWS, W8_ZERO, pack_w4g32, pack_w8, unpack_w4g32, unpack_w8
from unicorn_backend.quantize.recipe import FLOAT
from unicorn_backend.quantize.schemes import quantize_weight

if TYPE_CHECKING:
    from unicorn_backend.quantize.skeleton import Skeleton
    from unicorn_backend.quantize.source import Source

METHOD = "compressed-tensors"
_PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
_BITS = {"w4g32": 4, "w8c": 8}


def pack_words(q: Tensor, bits: int) -> Tensor:
    """int8 [n, k] -> int32 [n, k * bits / 32]."""
    per_word = 32 // bits
    unsigned = (q.to(torch.int32) + (1 << (bits - 1))).view(q.shape[0], -1, per_word)
    words = torch.zeros(unsigned.shape[:2], dtype=torch.int32)
    for i in range(per_word):
        words |= unsigned[..., i] << (bits * i)
    return words


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_words`: int8 [n, words * 32 / bits]."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    unsigned = (words[..., None] >> shifts) & ((1 << bits) - 1)
    return (unsigned - (1 << (bits - 1))).to(torch.int8).view(words.shape[0], -1)


@dataclass(frozen=True)
class CompressedTensor(StoredTensor):
    """A weight [N, K] made of the tensors above. `offset` is that of the packed integers."""

    bits: int = 4
    integers: StoredTensor | None = None
    scales: StoredTensor | None = None
    kept: str | None = None

    @property
    def scheme(self) -> str | None:
        return self.kept

    @property
    def type_name(self) -> str:
        return f"INT{self.bits} in groups of {self.group}"

    @property
    def group(self) -> int:
        assert self.scales is not None
        return self.shape[1] // self.scales.shape[1]

    @property
    def nbytes(self) -> int:
        assert self.integers is not None and self.scales is not None
        return self.integers.nbytes + self.scales.nbytes

    @property
    def row_bytes(self) -> int:
        return self.nbytes // self.shape[0]

    def read(self, first: int = 0, last: int | None = None) -> Tensor:
        k = self.shape[1]
        last = self.numel if last is None else last
        return self.rows(first // k, -(-last // k)).view(-1)[first % k :][: last - first]

    def rows(self, first: int, last: int) -> Tensor:
        q, s = self._parts(first, last)
        return q.float() * s.float().repeat_interleave(self.group, dim=1)

    def packed_rows(self, first: int, last: int) -> list[Tensor]:
        q, s = self._parts(first, last)
        if self.kept == "w4g32":
            return pack_w4g32(q, s.repeat_interleave(self.group // GROUP, dim=1).half())
        return pack_w8((q.to(torch.int16) + W8_ZERO).to(torch.uint8), s.float()[:, 0])

    def _parts(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        assert self.integers is not None and self.scales is not None
        integers = self.integers.rows(first, last)
        q = unpack_words(integers, self.bits) if integers.dtype == torch.int32 else integers
        return q[:, : self.shape[1]], self.scales.rows(first, last)


def merge(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint with each quantized weight in one. CheckpointError for what is not read."""
    merged: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(".weight_packed") or (name.endswith(".weight") and tensor.dtype == torch.int8):
            weight = f"{name.rpartition('.')[0]}.weight"
            merged[weight] = _weight(weight, tensor, tensors)
        elif not name.endswith(_PARTS):
            merged[name] = tensor
    return merged


def _weight(name: str, integers: StoredTensor, tensors: Mapping[str, StoredTensor]) -> CompressedTensor:
    for part in ("zero_point", "g_idx"):
        if f"{name}_{part}" in tensors:
            raise CheckpointError(f"{integers.file}: tensor '{name}_{part}': only symmetric weights in order are read")
    scales = tensors.get(f"{name}_scale")
    if scales is None:
        raise CheckpointError(f"{integers.file}: tensor {integers.name!r} has no {name}_scale beside it")
    shape = integers.shape if integers.dtype == torch.int8 else _stored_shape(name, integers, tensors)
    bits = 8 if integers.dtype == torch.int8 else integers.shape[-1] * 32 // max(shape[-1], 1)
    matrix = len(shape) == len(integers.shape) == len(scales.shape) == 2 and shape[0] == integers.shape[0]
    words = shape[-1] if integers.dtype == torch.int8 else -(-shape[-1] * bits // 32)
    if not matrix or bits not in (4, 8) or integers.shape[1] != words or scales.shape[0] != shape[0]:
        raise CheckpointError(
            f"{integers.file}: tensor {integers.name!r} {list(integers.shape)} with scales {list(scales.shape)} is no "
            f"INT4 or INT8 weight of shape {list(shape)}"
        )
    if scales.shape[1] == 0 or shape[1] % scales.shape[1] or not scales.dtype.is_floating_point:
        raise CheckpointError(f"{scales.file}: tensor {scales.name!r} has {scales.dtype} {list(scales.shape)}")
    weight = CompressedTensor(name, torch.float32, shape, integers.file, integers.offset, bits, integers, scales)
    return dataclasses.replace(weight, kept=_exact_scheme(weight, scales))


def _stored_shape(name: str, integers: StoredTensor, tensors: Mapping[str, StoredTensor]) -> tuple[int, ...]:
    stored = tensors.get(f"{name}_shape")
    if stored is None or stored.shape != (2,) or stored.dtype not in (torch.int64, torch.int32):
        raise CheckpointError(
            f"{integers.file}: tensor {integers.name!r} has no {name}_shape of two integers beside it"
        )
    return tuple(int(size) for size in stored.read())


def _exact_scheme(weight: CompressedTensor, scales: StoredTensor) -> str | None:
    """The scheme that holds every value: w4g32 where its fp16 holds the scales, w8c for one scale per row."""
    if weight.bits == 8:
        return "w8c" if scales.shape[1] == 1 and scales.dtype != torch.float64 else None
    if weight.group % GROUP:
        return None
    values = scales.read()
    return "w4g32" if torch.equal(values.half().to(values.dtype), values) else None


class CompressedTensorsOut:
    """Linears as INT4 in groups of 32 and INT8 per row; tables stay float, as compressed-tensors has none."""

    name = METHOD

    def __init__(self, source: Source, model: Skeleton) -> None:
        self._linears = {f"{name}.weight" for name, module in model.model.named_modules() if _is_linear(module)}
        self._dtype: torch.dtype = source.dtype
        self._parameter_of = model.parameter_of

    def together(self, name: str) -> int:
        return 1

    def computed(self) -> list[StoredTensor]:
        return []

    def label(self, shape: tuple[int, ...], scheme: str) -> str:
        return {"w4g32": "int4-g32", "w8c": "int8-channel"}.get(scheme, FLOAT)

    def outputs(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], scheme: str) -> Declared:
        if scheme not in (*_BITS, "w8a", FLOAT):
            raise CheckpointError(f"{name}: compressed-tensors cannot hold {scheme}; use w4g32, w8c or another format")
        if scheme not in _BITS:
            return {name: (self._dtype if scheme != FLOAT else dtype, shape)}
        n, k = shape
        if k % GROUP:
            raise CheckpointError(f"{name}: {k} columns are no multiple of {GROUP}, which compressed-tensors needs")
        return {
            f"{name}_packed": (torch.int32, (n, k * _BITS[scheme] // 32)),
            f"{name}_scale": (self._dtype, (n, k // GROUP if scheme == "w4g32" else 1)),
            f"{name}_shape": (torch.int64, (2,)),
        }

    def encode(
        self,
        name: str,
        shape: tuple[int, ...],
        scheme: str,
        first: int,
        rows: Rows,
        importance: Tensor | None = None,
    ) -> tuple[list[Encoded], Noise]:
        if scheme == FLOAT:
            return copied(name, first, rows)
        assert isinstance(rows, Tensor) or scheme in _BITS
        if scheme not in _BITS:
            assert isinstance(rows, Tensor)
            return copied(name, first * shape[1], rows.to(self._dtype))
        packed = rows if isinstance(rows, list) else quantize_weight(rows, scheme, importance)
        q, scale, noise = self._quantized(rows, packed, scheme, min(shape[0] - first, _count(rows)), shape[1])
        words = pack_words(q, _BITS[scheme])
        written = [
            (f"{name}_packed", first * words.shape[1] * 4, words),
            (f"{name}_scale", first * scale.shape[1] * scale.element_size(), scale),
        ]
        return written if first else [*written, (f"{name}_shape", 0, torch.tensor(shape))], noise

    def _quantized(self, rows: Rows, packed: list[Tensor], scheme: str, n: int, k: int) -> tuple[Tensor, Tensor, Noise]:
        """(int8 [n, k], scales in the model's dtype [n, groups], noise): levels are taken for the rounded scales."""
        if scheme == "w4g32":
            q, s = unpack_w4g32(packed[0], packed[1], n, k)
        else:
            unsigned, per_row, _ = unpack_w8(packed, n, k)
            q, s = (unsigned.to(torch.int16) - W8_ZERO).to(torch.int8), per_row[:, None]
        scale, group = s.to(self._dtype), k // s.shape[1]
        x = rows.float() if isinstance(rows, Tensor) else q.float() * s.float().repeat_interleave(group, dim=1)
        wide = scale.float().repeat_interleave(group, dim=1)
        if not torch.equal(scale.to(s.dtype), s):
            low, high = (-8, 7) if scheme == "w4g32" else (-127, 127)
            q = torch.where(wide == 0, torch.zeros_like(x), x / wide).round().clamp(low, high).to(torch.int8)
        elif isinstance(rows, list):
            return q, scale, LOSSLESS
        error = x - q.float() * wide
        return q, scale, (squares(x), squares(error))

    def layout(self, declared: Declared, shard_bytes: int) -> Layout:
        return sharded(declared, shard_bytes)

    def write_beside(self, folder: Path, source: Source, model: Skeleton, labels: Mapping[str, str]) -> None:
        source.write_beside(folder)
        write_config(folder, source, model, self._config(labels))

    def _config(self, labels: Mapping[str, str]) -> dict[str, Any]:
        """`quantization_config` of config.json; weights are named one by one."""
        modules: dict[str, list[str]] = {"int4-g32": [], "int8-channel": [], FLOAT: []}
        for key, label in labels.items():
            name = self._parameter_of(key)
            if name in self._linears:
                modules[label].append(name.removesuffix(".weight"))
        args = {
            "int4-g32": {"num_bits": 4, "strategy": "group", "group_size": GROUP},
            "int8-channel": {"num_bits": 8, "strategy": "channel"},
        }
        groups = {
            f"group_{i}": {
                "targets": modules[label],
                "weights": {"type": "int", "symmetric": True, "dynamic": False, **arguments},
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
            for i, (label, arguments) in enumerate(args.items())
            if modules[label]
        }
        named = {f"{name}.weight" for names in modules.values() for name in names}
        return {
            "quant_method": METHOD,
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": sorted([*modules[FLOAT], *(name.removesuffix(".weight") for name in self._linears - named)]),
        }


def _count(rows: Rows) -> int:
    """Rows in a block, with the padding of the last tile if it is packed."""
    return rows[0].shape[0] * ROWS if isinstance(rows, list) else rows.shape[0]


def _is_linear(module: Any) -> bool:
    return isinstance(module, torch.nn.Linear)
