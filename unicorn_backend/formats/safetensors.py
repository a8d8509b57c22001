"""safetensors files: a strict reader of headers, and headers for files that are written piece by piece.

The safetensors package maps a whole file and writes a whole file at once; here weights larger than the
memory stream through, so tensors are read and written by rows at known offsets. Nothing in a file is
believed: every length and offset is checked before it is used, and an error names file and tensor.

    8 bytes   little-endian length of the header
    header    JSON: {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {...}}
    data      the tensors, in order of their offsets, without gaps
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unicorn_backend.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors package

# In the order in which the safetensors package writes them, last one first: the widest type first, so that
# every tensor is aligned to its element.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ORDER = {name: position for position, name in enumerate(DTYPES)}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: `nbytes` bytes from `offset` on."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def scheme(self) -> str | None:
        """The scheme whose packed form holds the stored values; None for floats."""
        return None

    @property
    def exact(self) -> bool:
        """Whether `scheme` holds the stored values to the bit, or only closely."""
        return True

    def dequantized(self) -> StoredTensor:
        """The same values, read as floats."""
        return self

    @property
    def type_name(self) -> str:
        """Name of the stored type if it is quantized."""
        return ""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of a matrix."""
        return self.shape[1] * self.dtype.itemsize

    def read(self, first: int = 0, last: int | None = None) -> Tensor:
        """Elements first..last-1 of the flattened tensor (all without arguments), as a 1-D tensor."""
        size = self.dtype.itemsize
        last = self.numel if last is None else last
        data = torch.empty((last - first) * size, dtype=torch.uint8)
        read_exactly(self.file, self.offset + first * size, data, self.name)
        return data.view(self.dtype)

    def rows(self, first: int, last: int) -> Tensor:
        """Rows first..last-1 of a matrix."""
        k = self.shape[1]
        return self.read(first * k, last * k).view(last - first, k)

    def packed_rows(self, first: int, last: int) -> list[Tensor]:
        """Rows first..last-1 (whole tiles) packed as `scheme` says, with the stored values (as `exact` says)."""
        raise TypeError(f"{self.file}: tensor {self.name!r} is not stored quantized")


@dataclass(frozen=True)
class StackedTensor(StoredTensor):
    """A matrix [N, K] whose rows are those of `parts` one under another: matrices, or 3-D tensors of matrices.

    transposed: the rows are the columns of the parts' matrices [.., K, columns].
    """

    parts: tuple[StoredTensor, ...] = ()
    transposed: bool = False

    def rows(self, first: int, last: int) -> Tensor:
        k, at, found = self.shape[1], 0, []
        for part in self.parts:
            count = part.numel // k
            begin, end = max(first - at, 0), min(last - at, count)
            if begin < end:
                turned = self.transposed
                found += self._columns(part, begin, end) if turned else [part.read(begin * k, end * k).view(-1, k)]
            at += count
        return found[0] if len(found) == 1 else torch.cat(found)

    def _columns(self, part: StoredTensor, first: int, last: int) -> list[Tensor]:
        """Columns first..last-1, counted through the matrices of a part, as rows. A matrix is read whole."""
        k, n, found = self.shape[1], part.shape[-1], []
        for i in range(first // n, -(-last // n)):
            matrix = part.read(i * k * n, (i + 1) * k * n).view(k, n)
            found.append(matrix[:, max(first - i * n, 0) : last - i * n].t().contiguous())
        return found

    def read(self, first: int = 0, last: int | None = None) -> Tensor:
        raise TypeError(f"{self.name!r} consists of {len(self.parts)} stored tensors: it is read by rows")


def read_exactly(path: Path, offset: int, into: Tensor, name: str) -> None:
    """Fill the uint8 tensor `into` from the file. CheckpointError if the file ends before."""
    buffer = as_bytes(into)
    with open(path, "rb", buffering=0) as file:
        done = 0
        while done < len(buffer):
            count = os.preadv(file.fileno(), [buffer[done:]], offset + done)
            if count == 0:
                raise CheckpointError(f"{path}: ends inside tensor {name!r}: copy or download it again")
            done += count


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, in the order of their data. CheckpointError for a damaged or cut file."""
    header, start, size = _read_json(path)
    tensors, end = [], 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        tensors.append(_entry(path, name, entry, start))
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    for tensor in tensors:
        if tensor.offset != start + end:
            raise _damaged(path, f"tensor {tensor.name!r} overlaps another or leaves a gap")
        end += tensor.nbytes
    if size != start + end:
        raise CheckpointError(
            f"{path}: cut short or damaged: {size} bytes, its header says {start + end}: copy or download it again"
        )
    return {tensor.name: tensor for tensor in tensors}


def _read_json(path: Path) -> tuple[dict[str, Any], int, int]:
    """(header, where the data starts, size of the file)."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise _damaged(path, f"{size} bytes, unreadable header")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        header = json.loads(text, object_pairs_hook=lambda pairs: _no_duplicates(path, pairs))
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise _damaged(path, f"{size} bytes, unreadable header") from error
    if not isinstance(header, dict):
        raise _damaged(path, f"{size} bytes, unreadable header")
    return header, 8 + length, size


def _no_duplicates(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _damaged(path, f"its header has {twice!r} twice")
    return found


def _entry(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    """One header entry, checked on its own."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"the header entry of tensor {name!r} is not one")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{path}: tensor {name!r} has dtype {dtype!r}, known are {', '.join(DTYPES)}")
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise _damaged(path, f"tensor {name!r} has shape {shape!r} at {offsets!r}")
    begin, end = offsets
    tensor = StoredTensor(name, DTYPES[dtype], tuple(shape), path, start + begin)
    if end - begin != tensor.nbytes:
        raise _damaged(path, f"tensor {name!r} of {dtype} {shape} has {end - begin} bytes, not {tensor.nbytes}")
    return tensor


def _is_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: damaged or cut short ({what}): copy or download it again")


def make_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """(the first bytes of a file with these tensors, {name: offset in the file}).

    The same bytes as the safetensors package writes for the same tensors.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in sorted(tensors, key=lambda name: (-_ORDER[NAMES[tensors[name][0]]], name)):
        dtype, shape = tensors[name]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    offsets = {name: start + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}
    return len(text).to_bytes(8, "little") + text, offsets


def folder_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint folder: `model.safetensors`, or the shards that the index names.

    CheckpointError for a missing or damaged shard, a name in two shards, or one that its shard does not have.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.exists():
            raise CheckpointError(
                f"{folder}: no model.safetensors and no model.safetensors.index.json (pickled weights are not read: "
                "load the model with transformers and save it once with save_pretrained)"
            )
        return read_header(single)
    places = _weight_map(index)
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(places.values())):
        if not (folder / shard).exists():
            count = sum(place == shard for place in places.values())
            raise CheckpointError(f"{folder / shard}: missing; {index.name} says it holds {count} tensors")
        found = read_header(folder / shard)
        if twice := next((name for name in found if name in tensors), None):
            raise CheckpointError(f"tensor {twice!r} is in {tensors[twice].file} and in {folder / shard}")
        tensors.update(found)
    for name, shard in places.items():
        if name not in tensors or tensors[name].file.name != shard:
            raise CheckpointError(f"{folder / shard}: has no tensor {name!r}, which {index.name} says it holds")
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not an index of shards ({error})") from error
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index}: its weight_map is empty or no object")
    for name, shard in places.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{index}: tensor {name!r} is said to be in {shard!r}, which is no file name")
    return places


def sha256_of_range(path: Path, offset: int, size: int, block: int = 1 << 24) -> str:
    """SHA-256 of `size` bytes of a file from `offset` on, of fewer if it ends before."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while size > 0 and (data := os.pread(file.fileno(), min(size, block), offset)):
            digest.update(data)
            offset, size = offset + len(data), size - len(data)
    return digest.hexdigest()


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy if it is contiguous."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
