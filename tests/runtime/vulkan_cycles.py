"""Loads and unloads of a whole model: `VK_ICD_FILENAMES=... python -m tests.runtime.vulkan_cycles 1000`.

A cycle makes the embedded model cut to two layers, quantizes and compiles it for the CPU and lavapipe (or
`UNICORN_TEST_GPU`), generates from a prompt, and lets it go. Prints resident memory and the device's every 10 cycles.
Resident memory grows: torch 2.13 keeps the guards of every graph after `torch._dynamo.reset()`, 5 MB per cycle with its
own backend "eager", too.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.runtime import drivers
from tests.test_compile_cache import make
from unicorn_backend import assets, runtime

NEW = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}


class Left(NamedTuple):
    """What a cycle leaves behind."""

    resident: int  # bytes of this process
    used: int  # bytes of the device
    shared: int  # bytes of host memory that it holds
    regions: int
    maps: int  # mappings of this process
    tokens: tuple[int, ...]


def cycle(device: Any, ids: torch.Tensor) -> Left:
    model = make()
    options = {"devices": ["cpu", device.name], "policy": "fixed"}
    compiled: Any = torch.compile(model, backend="unicorn", options=options)
    tokens = tuple(compiled.generate(ids, attention_mask=torch.ones_like(ids), **NEW)[0].tolist())
    del model, compiled
    torch._dynamo.reset()
    gc.collect()
    memory = device.memory()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    maps = Path("/proc/self/maps").read_text().count("\n")
    return Left(resident, memory.used, memory.shared, len(device._regions), maps, tokens)


def cycles(device: Any, count: int, show: Callable[[str], None] = lambda line: None) -> list[Left]:
    ids = torch.randint(3, 4000, (1, 12), generator=torch.Generator().manual_seed(1))
    found = []
    for number in range(count + 1):
        found.append(cycle(device, ids))
        if number % 10 == 0 or number == count:
            left = found[-1]
            resident, used = (f"{size / 1e6:.1f} MB" for size in (left.resident, left.used))
            show(f"{number}: {resident} resident, {left.maps} mappings, {used} on the device, {left.regions} regions")
    return found


if __name__ == "__main__":
    assets.load_native()
    opened = runtime.open_device(f"vulkan:{drivers.NAMES[0]}")
    assert not isinstance(opened, str), opened
    left = cycles(opened, int(sys.argv[1]), lambda line: print(line, flush=True))
    assert len({(one.used, one.shared, one.regions, one.tokens) for one in left[1:]}) == 1
