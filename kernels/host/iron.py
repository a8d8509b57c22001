"""Stand-in for the part of `aie.iron` that the designs use: executes a design script instead of compiling it.

Every core, link of a memory tile and DMA of a shim is a thread; ObjectFifos are bounded by their depths; the
kernels are the host-compiled ones. Checked before the first step: bytes and DMA channels of every tile, and that
each transfer lies inside its buffer and fits a descriptor. Found while running: wrong element sizes, deadlocks
(every thread waits: no clock is involved) and trip counts that leave something behind. Not modelled: time, routing,
locks, program size.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np

from unicorn_backend.runtime.npu import designs

LINEAR_LIMIT = 1023  # largest size of a dimension of a descriptor that is not the innermost, linear one
REPEAT_LIMIT = 64


class DataflowError(Exception):
    """A design that the hardware would not run, or that would stop."""


class Deadlock(DataflowError):
    """Every thread waits. The message lists for what."""


class _Stop(BaseException):
    """The launch is over."""


@dataclass(frozen=True)
class Tile:
    col: int
    row: int


class TensorAccessPattern:
    def __init__(self, tensor_dims: tuple[int, ...], offset: int, sizes: list[int], strides: list[int]) -> None:
        self.offset, self.sizes, self.strides = offset, list(sizes), list(strides)

    def check(self, name: str, elements: int, element_bytes: int) -> None:
        repeat, *middle, inner = self.sizes
        last = self.offset + sum((n - 1) * s for n, s in zip(self.sizes, self.strides, strict=True))
        if len(self.sizes) != 4 or self.strides[3] != 1:
            raise DataflowError(f"{name}: a descriptor has four dimensions and a dense innermost one")
        if self.offset < 0 or last >= elements:
            raise DataflowError(f"{name}: reaches element {last} of a buffer of {elements}")
        if repeat > REPEAT_LIMIT or any(n > LINEAR_LIMIT for n in middle):
            raise DataflowError(f"{name}: sizes {self.sizes}, legal are up to {REPEAT_LIMIT}, {LINEAR_LIMIT}, ...")
        if any(x * element_bytes % 4 for x in (self.offset, inner, *self.strides[:3])):
            raise DataflowError(f"{name}: offsets and sizes must be multiples of 4 bytes")

    def pieces(self) -> Iterator[slice]:
        for index in np.ndindex(*self.sizes[:3]):
            at = self.offset + int(np.dot(index, self.strides[:3]))
            yield slice(at, at + self.sizes[3])


def _shape(kind: Any) -> tuple[int, np.dtype[Any]]:
    dims, dtype = get_args(kind)
    return int(np.prod(dims)), np.dtype(get_args(dtype)[0])


def _bytes(kind: Any) -> int:
    count, dtype = _shape(kind)
    return count * dtype.itemsize


def _buffer(kind: Any) -> np.ndarray:
    """A buffer of a tile with what was in it before: never zeros."""
    count, dtype = _shape(kind)
    raw = np.full(count * dtype.itemsize + 64, 0xA5, np.uint8)
    offset = -raw.ctypes.data % 64
    return raw[offset : offset + count * dtype.itemsize].view(dtype)


class ObjectFifo:
    """Objects from one producer to all consumers; a broadcast waits for the slowest."""

    def __init__(self, obj_type: Any, depth: int = 2, name: str = "") -> None:
        self.obj_type, self.depth, self.name = obj_type, depth, name
        self.producer: Producer | None = None
        self.consumers: list[Consumer] = []

    def prod(self, depth: int | None = None) -> Producer:
        if self.producer is None:
            self.producer = Producer(self, depth or self.depth)
        return self.producer

    def cons(self, depth: int | None = None) -> Consumer:
        self.consumers.append(Consumer(self, depth or self.depth))
        return self.consumers[-1]

    def ready(self) -> bool:
        return all(len(c.waiting) + c.held < c.depth for c in self.consumers)

    def deliver(self, data: np.ndarray) -> None:
        for consumer in self.consumers:
            copy = _buffer(self.obj_type)
            copy[:] = data
            consumer.waiting.append(copy)


class _End:
    owner: Any = None
    machine: Machine

    def __init__(self, fifo: ObjectFifo, depth: int) -> None:
        self.fifo, self.depth, self.held = fifo, depth, 0
        self.taken = 0  # objects acquired so far

    @property
    def bytes(self) -> int:
        return self.depth * _bytes(self.fifo.obj_type)


class Producer(_End):
    """Of a core: `depth` buffers, one of which it holds while the DMA sends the others."""

    def __init__(self, fifo: ObjectFifo, depth: int) -> None:
        super().__init__(fifo, depth)
        self.filled: deque[np.ndarray] = deque()
        self.current: np.ndarray | None = None

    def acquire(self, count: int) -> np.ndarray:
        assert count == 1
        self.machine.wait(lambda: len(self.filled) + self.held < self.depth, f"room in {self.fifo.name}")
        self.held += 1
        self.current = _buffer(self.fifo.obj_type)
        return self.current

    def release(self, count: int) -> None:
        assert count == 1 and self.current is not None
        with self.machine.changed():
            self.held -= 1
            self.filled.append(self.current)
            self.current = None

    def send(self) -> bool:
        """The DMA: sends what is filled as far as the consumers have room. Inside the machine's lock."""
        moved = False
        while self.filled and self.fifo.ready():
            self.fifo.deliver(self.filled.popleft())
            moved = True
        return moved

    def join(
        self, offsets: list[int], obj_types: list[Any], names: list[str], depths: list[int], placement: Tile
    ) -> Any:
        parts = [ObjectFifo(t, d, n) for t, d, n in zip(obj_types, depths, names, strict=True)]
        _LINKS.append(Link(placement, [p.cons(1) for p in parts], [self], offsets))
        return parts


class Consumer(_End):
    def __init__(self, fifo: ObjectFifo, depth: int) -> None:
        super().__init__(fifo, depth)
        self.waiting: deque[np.ndarray] = deque()

    def acquire(self, count: int) -> np.ndarray:
        assert count == 1
        self.machine.wait(lambda: bool(self.waiting), f"an object of {self.fifo.name}")
        with self.machine.changed():
            self.held += 1
            self.taken += 1
            return self.waiting.popleft()

    def release(self, count: int) -> None:
        assert count == 1 and self.held
        with self.machine.changed():
            self.held -= 1

    def forward(self, obj_type: Any, name: str, placement: Tile) -> ObjectFifo:
        return self.split([0], obj_types=[obj_type], names=[name], placement=placement, depths=[self.depth])[0]

    def split(
        self, offsets: list[int], obj_types: list[Any], names: list[str], placement: Tile, depths: list[int]
    ) -> list[ObjectFifo]:
        parts = [ObjectFifo(t, d, n) for t, d, n in zip(obj_types, depths, names, strict=True)]
        _LINKS.append(Link(placement, [self], [p.prod() for p in parts], offsets))
        return parts


@dataclass
class Link:
    """Objects in a memory tile: one in and its parts out, or parts in and the whole out."""

    tile: Tile
    inputs: list[Consumer]
    outputs: list[Producer]
    offsets: list[int]

    @property
    def whole(self) -> _End:
        return self.inputs[0] if len(self.inputs) == 1 else self.outputs[0]

    def run(self) -> None:
        machine = self.whole.machine
        while True:
            if len(self.inputs) == 1:
                whole = self.inputs[0].acquire(1)
                for out, offset in zip(self.outputs, self.offsets, strict=True):
                    _send(machine, out, whole[offset : offset + _shape(out.fifo.obj_type)[0]])
            else:
                whole = _buffer(self.outputs[0].fifo.obj_type)
                for part, offset in zip(self.inputs, self.offsets, strict=True):
                    whole[offset : offset + _shape(part.fifo.obj_type)[0]] = part.acquire(1)
                _send(machine, self.outputs[0], whole)
            for part in self.inputs:
                part.release(1)


def _send(machine: Machine, out: Producer, data: np.ndarray) -> None:
    """From a memory tile or shim, which needs no buffer beside the one that `data` lies in."""
    if data.size != _shape(out.fifo.obj_type)[0]:
        raise DataflowError(f"{out.fifo.name}: {data.size} elements for an object of {_shape(out.fifo.obj_type)[0]}")
    machine.wait(out.fifo.ready, f"room in {out.fifo.name}")
    with machine.changed():
        out.fifo.deliver(data)


class Kernel:
    library: ctypes.CDLL | None = None  # the host-compiled kernels of the design that runs

    def __init__(self, name: str, bin_name: str, arg_types: list[Any]) -> None:
        self.name, self.arg_types = name, arg_types

    def __call__(self, *arguments: np.ndarray) -> None:
        for argument, kind in zip(arguments, self.arg_types, strict=True):
            if (argument.size, argument.dtype) != _shape(kind):
                raise DataflowError(f"{self.name}: got {argument.size} x {argument.dtype}, takes {kind}")
        assert Kernel.library is not None
        getattr(Kernel.library, self.name)(*(ctypes.c_void_p(a.ctypes.data) for a in arguments))


class Worker:
    def __init__(self, core_fn: Callable[..., None], fn_args: list[Any], placement: Tile) -> None:
        self.core_fn, self.fn_args, self.tile = core_fn, fn_args, placement
        self.taken_in_rounds = 0  # objects that whole rounds have taken
        self.ends = [a for a in fn_args if isinstance(a, _End)]
        for end in self.ends:
            end.owner = self

    def run(self) -> None:
        while True:
            self.core_fn(*self.fn_args)
            self.taken_in_rounds = self.taken

    @property
    def taken(self) -> int:
        return sum(end.taken for end in self.ends)


@dataclass
class Transfer:
    fill: bool
    end: Any
    buffer: int
    tap: TensorAccessPattern
    tile: Tile


class Runtime:
    def __init__(self) -> None:
        self.types: tuple[Any, ...] = ()
        self.workers: list[Worker] = []
        self.transfers: list[Transfer] = []

    @contextmanager
    def sequence(self, *types: Any) -> Iterator[tuple[int, ...]]:
        self.types = types
        yield tuple(range(len(types)))

    def start(self, *workers: Worker) -> None:
        self.workers += workers

    def fill(self, in_fifo: Producer, source: int, tap: TensorAccessPattern, placement: Tile) -> None:
        self.transfers.append(Transfer(True, in_fifo, source, tap, placement))

    def drain(self, out_fifo: Consumer, dest: int, tap: TensorAccessPattern, wait: bool, placement: Tile) -> None:
        self.transfers.append(Transfer(False, out_fifo, dest, tap, placement))


_LINKS: list[Link] = []


@dataclass
class Usage:
    """What a design takes of each tile: bytes, channels in and out."""

    cores: list[tuple[int, int, int]] = field(default_factory=list)
    mem_tiles: dict[int, list[int]] = field(default_factory=dict)
    shims: dict[int, list[int]] = field(default_factory=dict)


class Program:
    def __init__(self, device: str, runtime: Runtime) -> None:
        self.device, self.runtime = device, runtime
        self.links = list(_LINKS)
        _LINKS.clear()

    def resolve_program(self, placer: Any) -> Program:
        return self

    def usage(self, core_extra_bytes: int) -> Usage:
        """Bytes and channels of every tile, or DataflowError. `core_extra_bytes`: stack and static data of a core."""
        usage = Usage()
        for worker in self.runtime.workers:
            size = core_extra_bytes + sum(end.bytes for end in worker.ends)
            ins = sum(isinstance(end, Consumer) for end in worker.ends)
            usage.cores.append((size, ins, len(worker.ends) - ins))
            _limit(f"core {worker.tile}", "bytes", size, designs.CORE_BYTES)
            _limit(f"core {worker.tile}", "channels in", ins, designs.CORE_CHANNELS)
            _limit(f"core {worker.tile}", "channels out", len(worker.ends) - ins, designs.CORE_CHANNELS)
        for link in self.links:
            tile = usage.mem_tiles.setdefault(link.tile.col, [0, 0, 0])
            for i, amount in enumerate((link.whole.bytes, len(link.inputs), len(link.outputs))):
                tile[i] += amount
        for column, (size, ins, outs) in usage.mem_tiles.items():
            _limit(f"memory tile {column}", "bytes", size, designs.MEM_TILE_BYTES)
            _limit(f"memory tile {column}", "channels in", ins, designs.MEM_TILE_CHANNELS)
            _limit(f"memory tile {column}", "channels out", outs, designs.MEM_TILE_CHANNELS)
        for transfer in self.runtime.transfers:
            shim = usage.shims.setdefault(transfer.tile.col, [0, 0])
            shim[not transfer.fill] += 1
            count, dtype = _shape(self.runtime.types[transfer.buffer])
            transfer.tap.check(transfer.end.fifo.name, count, dtype.itemsize)
        for column, channels in usage.shims.items():
            _limit(f"shim {column}", "channels", max(channels), designs.SHIM_CHANNELS)
        return usage


def _limit(where: str, what: str, got: int, most: int) -> None:
    if got > most:
        raise DataflowError(f"{where}: {got} {what}, it has {most}")


class Machine:
    """Runs one launch of a program."""

    def __init__(self, program: Program, buffers: list[np.ndarray]) -> None:
        self._program, self._buffers = program, buffers
        self._lock = threading.Condition()
        self._waits: dict[int, str] = {}
        self._live = 0
        self._movers = 0
        self._over = False
        self._errors: list[Exception] = []
        self._fifos = {id(e.fifo): e.fifo for w in program.runtime.workers for e in w.ends}
        self._fifos |= {id(e.fifo): e.fifo for link in program.links for e in (*link.inputs, *link.outputs)}
        for fifo in self._fifos.values():
            for end in (fifo.producer, *fifo.consumers):
                if end is not None:
                    end.machine = self

    def wait(self, ready: Callable[[], bool], what: str) -> None:
        with self._lock:
            while not ready():
                if self._over:
                    raise _Stop
                self._waits[threading.get_ident()] = what
                self._check_progress()
                if not self._over:
                    self._lock.wait()

    @contextmanager
    def changed(self) -> Iterator[None]:
        with self._lock:
            yield
            for fifo in self._fifos.values():
                if fifo.producer is not None:
                    fifo.producer.send()
            self._waits.clear()
            self._lock.notify_all()

    def _check_progress(self) -> None:
        if len(self._waits) < self._live or self._over:
            return
        self._over = True
        if self._movers:
            lines = "\n".join(f"  {count} x waiting for {what}" for what, count in _counted(self._waits.values()))
            self._errors.append(Deadlock(f"every thread waits:\n{lines}"))
        self._lock.notify_all()

    def run(self) -> None:
        """Raises DataflowError."""
        movers = [lambda t=t: self._move(t) for t in self._program.runtime.transfers]
        others = [w.run for w in self._program.runtime.workers] + [link.run for link in self._program.links]
        self._movers, self._live = len(movers), len(movers) + len(others)
        threads = [
            threading.Thread(target=self._thread, args=(f, i < len(movers))) for i, f in enumerate(movers + others)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._errors:
            raise self._errors[0]
        for worker in self._program.runtime.workers:
            if worker.taken_in_rounds != worker.taken or not worker.taken:
                raise DataflowError(
                    f"core {worker.tile} stopped in the middle of a round: the trip counts do not match"
                )
        for fifo in self._fifos.values():
            if any(consumer.waiting for consumer in fifo.consumers):
                raise DataflowError(f"objects are left in {fifo.name}: the trip counts do not match")

    def _thread(self, body: Callable[[], None], mover: bool) -> None:
        try:
            body()
        except _Stop:
            pass
        except Exception as error:
            with self._lock:
                self._errors.append(error)
                self._over = True
        with self._lock:
            self._live -= 1
            self._movers -= mover
            self._waits.pop(threading.get_ident(), None)
            if self._live:
                self._check_progress()
            self._lock.notify_all()

    def _move(self, transfer: Transfer) -> None:
        data, fifo = self._buffers[transfer.buffer], transfer.end.fifo
        size = _shape(fifo.obj_type)[0]
        for piece in transfer.tap.pieces():
            if (piece.stop - piece.start) % size:
                raise DataflowError(f"{fifo.name}: {piece.stop - piece.start} elements are no whole objects of {size}")
            for at in range(piece.start, piece.stop, size):
                if transfer.fill:
                    _send(self, transfer.end, data[at : at + size])
                else:
                    data[at : at + size] = transfer.end.acquire(1)
                    transfer.end.release(1)


def _counted(items: Any) -> list[tuple[str, int]]:
    seen: dict[str, int] = {}
    for item in items:
        seen[item] = seen.get(item, 0) + 1
    return sorted(seen.items())


def install() -> None:
    """Make `import aie.iron` find this stand-in."""
    contents: dict[str, dict[str, Any]] = {
        "aie": {},
        "aie.helpers": {},
        "aie.helpers.taplib": {"TensorAccessPattern": TensorAccessPattern},
        "aie.iron": {c.__name__: c for c in (Kernel, ObjectFifo, Program, Runtime, Worker)},
        "aie.iron.controlflow": {"range_": range},
        "aie.iron.device": {"NPU1": lambda: "npu1", "NPU2": lambda: "npu2", "Tile": Tile},
        "aie.iron.placers": {"SequentialPlacer": object},
    }
    for name, values in contents.items():
        module = types.ModuleType(name)
        vars(module).update(values)
        sys.modules[name] = module
