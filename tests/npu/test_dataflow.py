"""The IRON designs, executed on bounded FIFOs: same bytes as the launcher, limits of every tile, deadlocks."""

from __future__ import annotations

import ctypes
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.npu.conftest import Launch
from tests.npu.test_kernels import case, int8
from tests.scripts import load
from unicorn_backend.runtime.npu import host_model, pack
from unicorn_backend.runtime.npu.artifacts import KERNELS
from unicorn_backend.runtime.npu.designs import Attention, Design, Gemm, IllegalDesign, key


@pytest.fixture(scope="module")
def iron() -> Iterator[ModuleType]:
    before = dict(sys.modules)
    module = load(KERNELS / "host" / "iron.py")
    module.install()
    yield module
    for name in set(sys.modules) - set(before):
        if name.split(".")[0] in ("aie",) or name.startswith("script_"):
            del sys.modules[name]


@pytest.fixture
def execute(iron: ModuleType, tmp_path: Path) -> Callable[..., np.ndarray]:
    """(design, inputs) -> the bytes of the last buffer after one launch, executed by the design's own script."""

    def run(design: Design, inputs: list[np.ndarray], change: Callable[[Any], None] = lambda program: None) -> Any:
        library = tmp_path / f"{key(design)}.so"
        if not library.exists():
            host_model.compile_design(design, library)
        iron.Kernel.library = ctypes.CDLL(str(library))
        program = load(KERNELS / "designs" / f"{design.kind}.py").program(design, "kernels.o")
        program.usage(extra_bytes(design))
        change(program)
        types = [iron._shape(t)[1] for t in program.runtime.types]
        buffers = [host_model.aligned(size, 0xA5) for size in design.buffer_bytes]
        for buffer, data in zip(buffers, inputs, strict=False):
            buffer[:] = data
        iron.Machine(program, [b.view(t) for b, t in zip(buffers, types, strict=True)]).run()
        return buffers[-1]

    return run


def extra_bytes(design: Design) -> int:
    """Stack and static data of a core: what `core_bytes` counts beside the FIFOs."""
    if isinstance(design, Gemm):
        return 1024
    return 1024 + 5 * design.generation.product_rows * design.keys


DESIGNS: list[Design] = [
    Gemm("npu1", 384, 512),
    Gemm("npu2", 256, 512),
    Attention("npu1", 64, 32, 64, 3),
    Attention("npu2", 128, 16, 32, 4),
]


def inputs_of(design: Design) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    if isinstance(design, Gemm):
        a = int8(rng, "random", design.tokens, design.k)
        return [pack.gemm_a(design, a), pack.gemm_b(design, int8(rng, "random", design.n, design.k))]
    rows, keys = case(rng, design, "window", "random", design.query_rows, design.key_range)
    return [pack.query_blocks(design, rows), pack.key_blocks(design, keys)]


@pytest.mark.parametrize("design", DESIGNS, ids=key)
def test_design_computes_what_the_launcher_computes(
    launch: Launch, execute: Callable[..., np.ndarray], design: Design
) -> None:
    inputs = inputs_of(design)
    assert (execute(design, inputs) == launch(design, inputs)).all()


@pytest.mark.parametrize(
    "design",
    [*DESIGNS, Gemm("npu1", 5376, 4096), Gemm("npu2", 2560, 4096), Attention("npu1", 256), Attention("npu2", 256)],
    ids=key,
)
def test_limits_of_every_tile(iron: ModuleType, design: Design) -> None:
    """What the script asks for is what `designs.py` computes, and fits."""
    usage = load(KERNELS / "designs" / f"{design.kind}.py").program(design, "k.o").usage(extra_bytes(design))
    assert len(usage.cores) == design.generation.rows * design.generation.columns
    assert {size for size, _, _ in usage.cores} == {design.core_bytes()}
    assert {(ins, outs) for _, ins, outs in usage.cores} == {(2, 1)}


def test_wrong_trip_count_is_a_deadlock(iron: ModuleType, execute: Callable[..., np.ndarray]) -> None:
    """A core built for one block more than the host sends: on hardware a time-out without a word."""
    design = Attention("npu1", 64, 32, 64, 3)

    def one_more(program: Any) -> None:
        for transfer in program.runtime.transfers:
            if transfer.end.fifo.name.startswith("k_in"):
                transfer.tap.sizes[3] -= design.keys_bytes

    with pytest.raises(iron.Deadlock, match=r"16 x waiting for an object of k_|4 x waiting for an object of k_0"):
        execute(design, inputs_of(design), one_more)


def test_too_many_objects_are_reported(iron: ModuleType, execute: Callable[..., np.ndarray]) -> None:
    design = Attention("npu1", 64, 32, 64, 3)

    def one_less(program: Any) -> None:
        for worker in program.runtime.workers:
            worker.core_fn = _shorter(design)

    with pytest.raises(iron.DataflowError, match=r"trip counts|every thread waits"):
        execute(design, inputs_of(design), one_less)


def _shorter(design: Attention) -> Callable[..., None]:
    def run(query: Any, keys: Any, state: Any, init: Any, attend: Any) -> None:
        q, o = query.acquire(1), state.acquire(1)
        init(o)
        for _ in range(design.blocks - 1):
            attend(q, keys.acquire(1), o)
            keys.release(1)
        query.release(1)
        state.release(1)

    return run


def test_what_does_not_fit_is_refused(iron: ModuleType) -> None:
    program = load(KERNELS / "designs" / "attention_i8.py").program(DESIGNS[2], "k.o")
    with pytest.raises(iron.DataflowError, match="bytes, it has 65536"):
        program.usage(60000)
    program.links.append(program.links[0])
    with pytest.raises(iron.DataflowError, match="channels"):
        program.usage(1024)
    tap = program.runtime.transfers[0].tap
    program.links.pop()
    tap.sizes[0] = 65
    with pytest.raises(iron.DataflowError, match="legal are up to 64"):
        program.usage(1024)
    tap.sizes[0], tap.offset = 1, 10**9
    with pytest.raises(iron.DataflowError, match="of a buffer of"):
        program.usage(1024)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Gemm("npu3", 256, 256), "allowed are npu1, npu2"),
        (lambda: Gemm("npu1", 200, 256), r"k: got 200, legal are the multiples of 128"),
        (lambda: Gemm("npu1", 256, 300), r"n: got 300, legal are the multiples of 256 from 256 to 16384"),
        (lambda: Gemm("npu2", 256, 512, 24), r"tile_m: got 24, legal .* are 16, 32, 48"),
        (lambda: Gemm("npu1", 256, 256, 128, 128, 64), r"tile_m: got 128, legal .*64 KiB"),
        (lambda: Attention("npu1", 80), r"head_dim: got 80, legal .* are 64, 96, 128, 192, 256"),
        (lambda: Attention("npu1", 128, 40), r"rows: got 40, legal .* are 16, 32, 48"),
        (lambda: Attention("npu1", 256, 16, 64), r"keys: got 64, legal .* are 16, 32 "),
        (lambda: Attention("npu1", 128, blocks=0), r"blocks: got 0, legal are the multiples of 1 from 1 to 2048"),
    ],
)
def test_illegal_designs_list_what_is_legal(make: Callable[[], Design], says: str) -> None:
    with pytest.raises(IllegalDesign, match=says):
        make()


def test_the_key_has_every_parameter() -> None:
    """Two designs that differ anywhere have different keys."""
    base: list[Design] = [Gemm("npu1", 512, 512), Attention("npu1", 128, 16, 32, 4)]
    for design in base:
        names = [f.name for f in dataclasses.fields(design)]
        other = {"target": "npu2", "k": 1024, "n": 1024, "tile_m": 16, "tile_k": 64, "tile_n": 32}
        other |= {"head_dim": 64, "rows": 32, "keys": 16, "blocks": 5}
        keys = {key(dataclasses.replace(design, **{name: other[name]})) for name in names}
        assert len(keys | {key(design)}) == len(names) + 1
