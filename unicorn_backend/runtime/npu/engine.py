"""Whole products and whole attentions out of launches: on the NPU, or the same integers in NumPy.

Blockwise: a launch has a fixed size, so inputs of any size go through a few persistent slots (buffers and a run
each), several to a runlist: the host fills one while the NPU works on the other. A kernel serves only after its first
runlist gave NumPy's bits on this machine. After a time-out or a failed command nothing of the device is used any
more: it may still write, so its buffers are kept.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from unicorn_backend.runtime.npu import arithmetic, artifacts, host_model, pack
from unicorn_backend.runtime.npu.arithmetic import Keys, Rows, State
from unicorn_backend.runtime.npu.designs import Attention, Design, Gemm, key
from unicorn_backend.runtime.npu.xrt import COMPLETED, STATES, Context, Started, Xrt, XrtError

log = logging.getLogger(__name__)

CHAIN = 4  # launches of a runlist
CHAINS = 2  # runlists per kernel
BUDGET_BYTES = 2 << 30
TIMEOUT_MS = 5000  # of a runlist, whose launches take milliseconds

Int8 = NDArray[np.int8]
Int32 = NDArray[np.int32]


class Unavailable(Exception):
    """Why this cannot run on the NPU: the region answers with it, and the CPU takes over."""


@dataclass(eq=False)
class Weights:
    """The b of a product, where the engine wants it."""

    design: Gemm
    rows: int  # n without padding
    held: Any


class Engine(Protocol):
    """Integer products and attentions."""

    def prepare(self, design: Design) -> None:
        """Load and test the kernel of `design`. Raises Unavailable."""

    def weights(self, design: Gemm, b: Int8) -> Weights:
        """b [N, K] int8. Raises Unavailable."""

    def gemm(self, weights: Weights, a: Int8) -> Int32:
        """a [M, K] -> [M, N]. Raises Unavailable."""

    def attend(self, design: Attention, rows: Rows, keys: Keys) -> State:
        """Merged over all keys; m, l, O in float64. Raises Unavailable."""


def merge(parts: list[State]) -> State:
    """States of several ranges of keys -> one, in float64 (l and O in units of the largest m)."""
    if len(parts) == 1:
        return State(parts[0].m, parts[0].l.astype(np.float64), parts[0].o.astype(np.float64))
    m = np.max([part.m for part in parts], axis=0)
    factors = [np.exp2((part.m - m) / 256.0) for part in parts]
    total = sum(part.l * f for part, f in zip(parts, factors, strict=True))
    return State(m, total, sum(part.o * f[:, None] for part, f in zip(parts, factors, strict=True)))


def tiles(design: Attention, rows: Rows, keys: Keys) -> Iterator[tuple[slice, int]]:
    """(query rows, range of keys) of every launch in which a row sees a key."""
    for begin in range(0, len(rows.q), design.query_rows):
        chunk = slice(begin, min(begin + design.query_rows, len(rows.q)))
        seen = rows.first[chunk] < rows.last[chunk]
        if not seen.any():
            continue
        low = int(rows.first[chunk][seen].min()) // design.key_range
        high = -(-int(rows.last[chunk][seen].max()) // design.key_range)
        for part in range(max(low, 0), min(high, len(keys.k) // design.key_range)):
            yield chunk, part


class NumpyEngine:
    """The same integers on the CPU."""

    def prepare(self, design: Design) -> None:
        pass

    def weights(self, design: Gemm, b: Int8) -> Weights:
        return Weights(design, len(b), np.ascontiguousarray(b.T))

    def gemm(self, weights: Weights, a: Int8) -> Int32:
        return arithmetic.gemm(a, weights.held)

    def attend(self, design: Attention, rows: Rows, keys: Keys) -> State:
        return _collect(design, rows, keys, lambda chunk, part: _attend(design, rows.part(chunk), keys, part))


class NpuEngine:
    """Launches through XRT."""

    def __init__(
        self, xrt: Xrt, root: Path, emulated: bool, budget_bytes: int, timeout_ms: int, builds: bool = False
    ) -> None:
        """`builds`: make what is missing with the host model (for the emulator, whose artifacts it may be)."""
        self.xrt, self._root, self._emulated, self._builds = xrt, root, emulated, builds
        self.budget_bytes, self.timeout_ms = budget_bytes, timeout_ms
        self.used_bytes = 0
        self.lost = ""
        self.launches = 0
        self.tops: dict[str, float] = {}  # by kind of kernel: measured, on hardware only
        self._lock = threading.RLock()
        self._kernels: dict[str, _Kernel | str] = {}
        self._kept: list[Any] = []  # what a dead device may still write to

    def kernel(self, design: Design) -> _Kernel:
        """Loaded and tested. Raises Unavailable; the reason of a kernel that failed stays."""
        with self._lock:
            if self.lost:
                raise Unavailable(self.lost)
            name = key(design)
            if name not in self._kernels:
                self._kernels[name] = self._load(design)
            found = self._kernels[name]
            if isinstance(found, str):
                raise Unavailable(found)
            return found

    def prepare(self, design: Design) -> None:
        self.kernel(design)

    def weights(self, design: Gemm, b: Int8) -> Weights:
        kernel = self.kernel(design)
        with self._lock:
            buffer = self.buffer(kernel.context, 1, design.buffer_bytes[1])
        buffer.data[:] = pack.gemm_b(design, b)
        buffer.to_device()
        weights = Weights(design, len(b), buffer)
        weakref.finalize(weights, self._freed, design.buffer_bytes[1])
        return weights

    def _freed(self, size: int) -> None:
        self.used_bytes -= size

    def gemm(self, weights: Weights, a: Int8) -> Int32:
        design = weights.design
        out = np.empty((len(a), weights.rows), np.int32)

        def finish(raw: NDArray[np.uint8], begin: int) -> None:
            part = pack.gemm_c(design, raw)[: len(a) - begin, : weights.rows]
            out[begin : begin + len(part)] = part

        with self.kernel(design) as kernel:
            for begin in range(0, len(a), design.tokens):
                inputs = [pack.gemm_a(design, a[begin : begin + design.tokens]), weights.held]
                kernel.submit(inputs, lambda raw, begin=begin: finish(raw, begin))
        return out

    def attend(self, design: Attention, rows: Rows, keys: Keys) -> State:
        if keys.packed is None:
            keys.packed = pack.key_blocks(design, keys)
        packed = keys.packed.reshape(-1, design.buffer_bytes[1])
        states: dict[tuple[int, int], State] = {}

        def finish(raw: NDArray[np.uint8], chunk: slice, part: int) -> None:
            states[chunk.start, part] = _cut(pack.states(design, raw), chunk.stop - chunk.start)

        with self.kernel(design) as kernel:
            for chunk, part in tiles(design, rows, keys):
                inputs = [pack.query_blocks(design, rows.part(chunk)), packed[part]]
                kernel.submit(inputs, lambda raw, chunk=chunk, part=part: finish(raw, chunk, part))
        return _collect(design, rows, keys, lambda chunk, part: states[chunk.start, part])

    def buffer(self, context: Context, index: int, size: int) -> Any:
        if self.used_bytes + size > self.budget_bytes:
            raise Unavailable(
                f"{size / 1e6:.0f} MB more than the budget of {self.budget_bytes / 1e9:.1f} GB would be in use"
            )
        try:
            made = context.buffer(index, size)
        except XrtError as error:
            raise Unavailable(str(error)) from error
        self.used_bytes += size
        return made

    def lose(self, reason: str, kept: Any) -> None:
        """The device is not used any more. Says so once."""
        with self._lock:
            self._kept.append(kept)
            if not self.lost:
                # Never freed, not at the interpreter's end either: XRT aborts a process that frees a run on its way.
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))
                self.lost = f"the NPU is not used any more in this process: {reason}"
                log.warning("%s", self.lost)

    def close(self) -> None:
        with self._lock:
            self.lost = self.lost or "the device was closed"
            self._kernels.clear()

    def _load(self, design: Design) -> _Kernel | str:
        found = artifacts.find(self._root, design, self._emulated)
        if isinstance(found, str) and self._builds:  # seconds of g++; for hardware it is minutes, and the user's
            try:
                found = host_model.build(design, self._root)
            except host_model.HostModelError as error:
                return str(error)
        if isinstance(found, str):
            return found
        try:
            kernel = _Kernel(self, design, self.xrt.context(found))
        except (XrtError, Unavailable) as error:
            return str(error)
        return kernel if not (failed := _self_test(self, kernel)) else failed


class _Kernel:
    """One loaded design and its slots. Used as a context manager, by one thread at a time: submit, then drain."""

    def __init__(self, engine: NpuEngine, design: Design, context: Context) -> None:
        self.design, self.context, self._engine = design, context, engine
        self._lock = threading.Lock()
        self._next = 0
        inputs = (0, 1, 2) if isinstance(design, Attention) else (0, 2)  # weights bring their own buffer
        self._chains = [
            _Chain(
                [_Slot({i: engine.buffer(context, i, design.buffer_bytes[i]) for i in inputs}) for _ in range(CHAIN)]
            )
            for _ in range(CHAINS)
        ]

    def __enter__(self) -> _Kernel:
        self._lock.acquire()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                self._start(self._chains[self._next])
                for turn in range(CHAINS):
                    self._finish(self._chains[(self._next + turn) % CHAINS])
        finally:
            for chain in self._chains:
                if chain.started is None:  # what an error left behind; what is started is waited for by the next user
                    chain.filled = 0
            self._lock.release()

    def submit(self, inputs: list[Any], done: Any) -> None:
        """Queue a launch; `done(bytes of the result)` runs when its slot is needed again, or at the end."""
        chain = self._chains[self._next]
        self._finish(chain)
        slot = chain.slots[chain.filled]
        given = {i: x for i, x in enumerate(inputs) if not isinstance(x, np.ndarray)}
        for index, data in enumerate(inputs):
            if index not in given:
                slot.buffers[index].data[:] = data
                slot.buffers[index].to_device()
        try:
            if slot.launch is None:
                slot.launch = self.context.launch([given.get(i, slot.buffers.get(i)) for i in range(3)])
            for index, buffer in given.items():
                slot.launch.set_buffer(index, buffer)
        except XrtError as error:
            self._engine.lose(str(error), self)
            raise Unavailable(self._engine.lost) from error
        slot.done = done
        chain.filled += 1
        if chain.filled == CHAIN:
            self._start(chain)

    def forget(self) -> None:
        """Drop the launches with the buffers that they own."""
        for chain in self._chains:
            for slot in chain.slots:
                slot.launch = None

    def _start(self, chain: _Chain) -> None:
        if not chain.filled:
            return
        try:
            chain.started = self.context.start([slot.launch for slot in chain.slots[: chain.filled]])
        except XrtError as error:
            self._engine.lose(str(error), self)
            raise Unavailable(self._engine.lost) from error
        self._engine.launches += chain.filled
        self._next = (self._next + 1) % CHAINS

    def _finish(self, chain: _Chain) -> None:
        if chain.started is None:
            return
        state = chain.started.wait(self._engine.timeout_ms)
        if state != COMPLETED:
            name = STATES.get(state, str(state))
            text = f"no answer in {self._engine.timeout_ms / 1000:g} s" if name == "TIMEOUT" else f"state {name}"
            self._engine.lose(f"{self.design.kind}: {text}", self)
            raise Unavailable(self._engine.lost)
        chain.started, filled, chain.filled = None, chain.filled, 0
        for slot in chain.slots[:filled]:
            slot.buffers[2].from_device()
            slot.done(slot.buffers[2].data)


@dataclass
class _Slot:
    buffers: dict[int, Any]
    launch: Any = None
    done: Any = None


@dataclass
class _Chain:
    """Slots whose launches go together. `started` is what waits for them, and keeps them until they are done."""

    slots: list[_Slot]
    filled: int = 0
    started: Started | None = None


def _self_test(engine: NpuEngine, kernel: _Kernel) -> str:
    """Bits of a whole runlist on random data against NumPy; the reason if the kernel must not serve.

    Each launch has its rows in another order, so that a result in another launch's buffer shows.
    """
    design, rng = kernel.design, np.random.default_rng(0)
    results: list[NDArray[np.uint8]] = []
    try:
        if isinstance(design, Gemm):
            a = rng.integers(-127, 128, (design.tokens, design.k)).astype(np.int8)
            b = rng.integers(-127, 128, (design.n, design.k)).astype(np.int8)
            buffer = engine.buffer(kernel.context, 1, design.buffer_bytes[1])
            buffer.data[:] = pack.gemm_b(design, b)
            buffer.to_device()
            inputs = [[pack.gemm_a(design, np.roll(a, turn, 0)), buffer] for turn in range(CHAIN)]
        else:
            rows, keys = test_case(design, rng)
            inputs = [
                [pack.query_blocks(design, rows.roll(turn)), pack.key_blocks(design, keys)] for turn in range(CHAIN)
            ]
        started = time.perf_counter()
        with kernel:
            for given in inputs:
                kernel.submit(given, lambda raw: results.append(raw.copy()))
        seconds = time.perf_counter() - started
    except Unavailable as error:
        return str(error)
    if isinstance(design, Gemm):
        engine.used_bytes -= design.buffer_bytes[1]
        kernel.forget()  # the next product brings its own weights
        want = [arithmetic.gemm(a, b.T)]
        got = [[pack.gemm_c(design, raw)] for raw in results]
    else:
        state = arithmetic.attend(rows, keys)
        want = [state.m, state.l, state.o]
        got = [[s.m, s.l, s.o] for s in (pack.states(design, raw) for raw in results)]
    same = all(
        bool((x == np.roll(y, turn, 0)).all()) for turn, one in enumerate(got) for x, y in zip(one, want, strict=True)
    )
    if same and not engine._emulated:  # the test's own launches, with their copies: what a caller gets
        engine.tops[design.kind] = CHAIN * design.operations / seconds / 1e12
    return "" if same else f"kernel {key(design)} does not give the CPU's integers on this machine: it must not serve"


def test_case(design: Attention, rng: np.random.Generator) -> tuple[Rows, Keys]:
    """One launch with a causal window, scores from flat to peaked."""
    n, keys, d = design.query_rows, design.key_range, design.head_dim
    last = 1 + np.arange(n) * keys // n
    rows = Rows(
        rng.integers(-127, 128, (n, d)).astype(np.int8),
        rng.integers(0, 16384, n).astype(np.int16),
        np.maximum(last - keys // 2, 0).astype(np.int32),
        last.astype(np.int32),
        16,
    )
    k, v = (rng.integers(-127, 128, (keys, d)).astype(np.int8) for _ in range(2))
    return rows, Keys(k, v, rng.integers(0, 4, design.blocks).astype(np.int32), design.keys)


def _cut(state: State, count: int) -> State:
    return State(state.m[:count], state.l[:count], state.o[:count])


def _attend(design: Attention, rows: Rows, keys: Keys, part: int) -> State:
    return arithmetic.attend(rows, keys, part * design.key_range, (part + 1) * design.key_range)


def _collect(design: Attention, rows: Rows, keys: Keys, state_of: Any) -> State:
    """The launches of `tiles` -> one state for all rows."""
    whole = arithmetic.start(*rows.q.shape)
    out = State(whole.m, whole.l.astype(np.float64), whole.o.astype(np.float64))
    parts: dict[int, list[State]] = {}
    stops: dict[int, int] = {}
    for chunk, part in tiles(design, rows, keys):
        parts.setdefault(chunk.start, []).append(state_of(chunk, part))
        stops[chunk.start] = chunk.stop
    for begin, found in parts.items():
        merged = merge(found)
        for name in "mlo":
            getattr(out, name)[begin : stops[begin]] = getattr(merged, name)
    return out
