"""Where weights lie: packed ones in huge pages or their file, and pages of dropped ones that were mapped from a file.

`from_pretrained` maps the whole safetensors file, and the mapping lives as long as any of its tensors
(the norms stay). Anonymous memory goes back when a weight is dropped; mapped pages would stay resident
until the kernel wants them, so they are handed back one weight at a time.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from unicorn_backend import measure
from unicorn_backend.layouts import BUFFERS
from unicorn_backend.quantize.modules import QuantEmbedding, QuantLinear

_MAPS = Path("/proc/self/maps")
_MADV_DONTNEED = 4  # Linux
_HUGE_PAGE = 2 << 20
_COMPILER = 512 << 20  # bytes that are left free on small machines: tracing and compiling take about as many
_LARGE = 256 << 20  # a vocabulary's table: too much to be read while one layer computes
_OURS = 1  # use count of a storage that nothing but our handle holds


class MappedFiles:
    """Address ranges of this process that are private mappings of files, as of now. Empty off Linux."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []
        for line in _MAPS.read_text().splitlines() if _MAPS.exists() else ():
            addresses, mode, _offset, _device, inode, *_path = line.split()
            if mode.endswith("p") and inode != "0":
                start, end = (int(part, 16) for part in addresses.split("-"))
                self._ranges.append((start, end))
        self._starts = [start for start, _ in self._ranges]  # the kernel lists them in order

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether all of a dense tensor's memory is part of a mapped file."""
        return self._inside(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)

    def _inside(self, start: int, end: int) -> bool:
        i = bisect.bisect_right(self._starts, start) - 1
        return i >= 0 and end <= self._ranges[i][1]

    def release(self, storage: torch.UntypedStorage) -> bool:
        """Give back the resident pages of `storage`; False if it is not file-mapped, or still in use.

        Call it with the only reference left. The file keeps the values: nothing is lost for a tensor
        that shares a page at the edges, as only whole pages inside the range are given back.
        """
        if torch._C._storage_Use_Count(storage._cdata) > _OURS:
            return False
        start, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        if not self._inside(start, end):
            return False
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if first >= last:
            return False
        libc = ctypes.CDLL(None)
        result: int = libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_DONTNEED)
        return result == 0


@dataclass(frozen=True)
class Placement:
    """Bytes of packed weights: moved into huge pages, and left in their files because RAM has no room for them."""

    moved: int
    left: int


def into_huge_pages(model: nn.Module, room: int | None = None) -> Placement:
    """Move the packed weights of `model` into one block of huge pages, in module order.

    Decode reads every weight once per token, and reads 2 MB pages 5 to 20 % faster than 4 KB pages. Each tensor
    is let go as soon as it is copied, so the peak grows by one weight. Tied modules stay tied.

    room: bytes for what is moved out of files; by default what RAM has to give, less a reserve for keys, values, the
    compiler and everything else (`_reserve`). Weights that exceed it stay mapped: spread evenly over the layers, so
    that the disk works while others compute, large tables last. Half of the reserve may keep them cached while nobody
    else needs it; those beyond are read from the disk by every call.
    """
    arena = torch.classes.unicorn.Arena
    tensors, users = _unplaced(model)
    if sum(tensor.nbytes for tensor in tensors.values()) < _HUGE_PAGE:
        return Placement(0, 0)
    staying = _without_room(tensors, room)
    passing = _spread(staying, sum(staying.values()) - _reserve() // 2)
    sizes = [tensor.nbytes for address, tensor in tensors.items() if address not in staying]
    block = arena(sizes)
    for address, places in users.items():
        tensor = tensors.pop(address)
        placed = _leave(tensor, address in passing) if address in staying else block.place(tensor)
        for module, name in places:
            module._buffers[name] = placed
    return Placement(sum(sizes), sum(staying.values()))


def _leave(tensor: torch.Tensor, passing: bool) -> torch.Tensor:
    """The same memory, marked: programs have it read ahead, and if it is only passing, given back after its use."""
    left: torch.Tensor = torch.classes.unicorn.Arena.leave(tensor, passing)
    return left


def _reserve() -> int:
    """Bytes of RAM that weights leave free: an eighth of it, at least what tracing and compiling take."""
    return max(measure.ram()[0] // 8, _COMPILER)


def _unplaced(model: nn.Module) -> tuple[dict[int, torch.Tensor], dict[int, list[tuple[nn.Module, str]]]]:
    """Address -> packed weight, and its modules and their names for it, of those that have no place yet."""
    arena = torch.classes.unicorn.Arena
    tensors: dict[int, torch.Tensor] = {}
    users: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name in BUFFERS if isinstance(module, (QuantLinear, QuantEmbedding)) else ():
            tensor = module._buffers.get(name)
            if tensor is not None and tensor.device.type == "cpu" and not (arena.holds(tensor) or arena.left(tensor)):
                users.setdefault(tensor.data_ptr(), []).append((module, name))
                tensors[tensor.data_ptr()] = tensor
    return tensors, users


def _without_room(tensors: Mapping[int, torch.Tensor], room: int | None) -> dict[int, int]:
    """Address -> bytes of the tensors that are to stay in their files."""
    files = MappedFiles()
    mapped = {address: tensor.nbytes for address, tensor in tensors.items() if files.holds(tensor)}
    if room is None:
        room = measure.ram()[1] - _reserve()
    excess = sum(mapped.values()) - room
    staying: dict[int, int] = {}
    for large in (False, True):
        candidates = {a: n for a, n in mapped.items() if (n > _LARGE) == large}
        staying |= _spread(candidates, excess - sum(staying.values()))
    return staying


def _spread(sizes: Mapping[int, int], wanted: int) -> dict[int, int]:
    """Some of `sizes`, of `wanted` bytes or nearly, taken evenly from the first to the last; all if they are fewer."""
    share = min(wanted / max(sum(sizes.values()), 1), 1.0)
    taken: dict[int, int] = {}
    due, done = 0.0, 0  # bytes that should have been taken by now, and those that were
    for address, nbytes in sizes.items():
        due += nbytes * share
        if share > 0 and done + nbytes / 2 <= due:
            taken[address] = nbytes
            done += nbytes
    return taken


def left_in_files(model: nn.Module) -> int:
    """Bytes of the packed weights that `into_huge_pages` left in their files, or would now."""
    if not any(isinstance(module, (QuantLinear, QuantEmbedding)) for module in model.modules()):
        return 0
    left = torch.classes.unicorn.Arena.left
    buffers = {buffer.data_ptr(): buffer for buffer in model.buffers() if buffer.device.type == "cpu"}
    return sum(b.nbytes for b in buffers.values() if left(b)) + sum(_without_room(_unplaced(model)[0], None).values())
