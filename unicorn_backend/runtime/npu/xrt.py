"""XRT, reached through the first that is there: our C wrapper (`kernels/xrt/wrapper.cpp`), else `pyxrt`.

Both give the same few things: a context per xclbin, buffers that stay, launches that are started as a runlist (one
command for all of them) and waited for without the interpreter lock. What the bindings get wrong is kept in here:
`pyxrt` waits with the lock held (so its state is polled), and for a runlist without a limit of time (see `_PyChain`);
it crashes on an argument too many (so the count is checked), and a run does not keep its buffers alive (so launches
do).
"""

from __future__ import annotations

import ctypes
import importlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from unicorn_backend.runtime.npu.artifacts import INSTRUCTIONS, XCLBIN, Artifact

OPCODE = 3  # "run control code", the first argument of every kernel of mlir-aie
FIRST_BUFFER = 3
COMPLETED = 4
STATES = {5: "ERROR", 6: "ABORT", 8: "TIMEOUT", 9: "NORESPONSE"}
POLL_SECONDS = 50e-6  # a launch takes 28 to 128 us, by published measurements
PENDING = (1, 2, 3, 7)
WRAPPER = "libunicorn_xrt.so"


DAMAGED = ("nvalid xclbin", "xclbin: buffer too small", "xclbin: m_length", "No valid DPU kernel")  # as XRT 2.25 says


class XrtError(Exception):
    """XRT said no. The message is XRT's, with what it usually means."""


class Buffer(Protocol):
    """Memory that the NPU reaches; `data` is the host's view, bytes."""

    data: NDArray[np.uint8]

    def to_device(self) -> None: ...

    def from_device(self) -> None: ...


class Launch(Protocol):
    """A run of the kernel with all arguments set; it owns them."""

    def set_buffer(self, index: int, buffer: Any) -> None: ...


class Started(Protocol):
    """Launches on their way; it owns them."""

    def wait(self, timeout_ms: int) -> int:
        """COMPLETED if all of them did; else the state of one that did not, 8 for a time-out."""


class Context(Protocol):
    """A hardware context: one xclbin, loaded."""

    def buffer(self, index: int, size: int) -> Any:
        """For argument `index` of the design, counted from 0. Raises XrtError."""

    def launch(self, buffers: Sequence[Any]) -> Any: ...

    def start(self, launches: Sequence[Any]) -> Started:
        """One after another, as a runlist where there are such. Raises XrtError."""


class Xrt(Protocol):
    """One NPU."""

    label: str  # "RyzenAI-npu1 through pyxrt, runlists"
    name: str  # as XRT names the device

    def context(self, artifact: Artifact) -> Context: ...


def explain(message: str) -> str:
    """XRT's message, and what to do where it is a known one."""
    known = (
        ("err=-11", "locked memory ran out: raise `ulimit -l` (docs/npu.md, memlock)"),
        ("err=11", "locked memory ran out: raise `ulimit -l` (docs/npu.md, memlock)"),
        ("CREATE_HWCTX", "no hardware context is free: another program holds them, or too many kernels are in use"),
        ("No such device", "the driver did not come up: see `sudo dmesg | grep amdxdna`; is its firmware installed?"),
        ("Permission denied", "add yourself to the group `render`, and log in again"),
        *((mark, "the file is damaged: build the kernel again") for mark in DAMAGED),
    )
    hints = [text for mark, text in known if mark in message]
    return f"{message.strip()} ({hints[0]})" if hints else message.strip()


def _label(name: str, how: str, runlists: bool) -> str:
    return f"{name} through {how}, {'runlists' if runlists else 'single runs'}"


class _Runs:
    """Launches started one by one."""

    def __init__(self, launches: Sequence[Any]) -> None:
        self._launches = list(launches)
        for launch in launches:
            launch.start()

    def wait(self, timeout_ms: int) -> int:
        end = time.monotonic() + timeout_ms / 1000
        for launch in self._launches:
            state = int(launch.wait(max(round((end - time.monotonic()) * 1000), 1)))  # 0 would be without end
            if state != COMPLETED:
                return state
        return COMPLETED


# --- pyxrt, and the emulator that has its interface ---------------------------------------------


class PyXrt:
    """`module`: pyxrt, or the emulator."""

    def __init__(self, module: Any, how: str, index: int = 0) -> None:
        self._module = module
        try:
            self._device = module.device(index)
            self.name = str(self._device.get_info(module.xrt_info_device.name))
        except RuntimeError as error:
            raise XrtError(explain(str(error))) from error
        self.label = _label(self.name, how, hasattr(module, "runlist"))

    def context(self, artifact: Artifact) -> _PyContext:
        return _PyContext(self._module, self._device, artifact)


class _PyContext:
    def __init__(self, module: Any, device: Any, artifact: Artifact) -> None:
        self._module, self._device = module, device
        words = np.frombuffer((artifact.folder / INSTRUCTIONS).read_bytes(), np.uint32)
        try:
            image = module.xclbin(str(artifact.folder / XCLBIN))
            kernels = [k for k in image.get_kernels() if k.get_name().startswith("MLIR_AIE")]
            if not kernels:
                raise XrtError(f"{artifact.folder / XCLBIN} has no kernel MLIR_AIE")
            self._count = int(kernels[0].get_num_args())
            device.register_xclbin(image)
            self._context = module.hw_context(device, image.get_uuid())
            self._kernel = module.kernel(self._context, kernels[0].get_name())
            self._control = module.bo(device, words.nbytes, module.bo.cacheable, self._kernel.group_id(1))
            self._control.write(words.view(np.uint8), 0)
            self._control.sync(module.xclBOSyncDirection.XCL_BO_SYNC_BO_TO_DEVICE)
        except RuntimeError as error:
            raise XrtError(explain(str(error))) from error
        self._words = len(words)

    def buffer(self, index: int, size: int) -> _PyBuffer:
        try:
            group = self._kernel.group_id(FIRST_BUFFER + index)
            return _PyBuffer(self._module, self._module.bo(self._device, size, self._module.bo.host_only, group))
        except RuntimeError as error:
            raise XrtError(explain(str(error))) from error

    def launch(self, buffers: Sequence[_PyBuffer]) -> _PyLaunch:
        if FIRST_BUFFER + len(buffers) > self._count:
            raise XrtError(f"the kernel takes {self._count - FIRST_BUFFER} buffers, the design has {len(buffers)}")
        run = self._module.run(self._kernel)
        run.set_arg(0, OPCODE)
        run.set_arg(1, self._control)
        run.set_arg(2, self._words)
        launch = _PyLaunch(run, self._control)
        for index, buffer in enumerate(buffers):
            launch.set_buffer(index, buffer)
        return launch

    def start(self, launches: Sequence[_PyLaunch]) -> Started:
        try:
            if len(launches) > 2 and hasattr(self._module, "runlist"):
                return _PyChain(self._module.runlist(self._context), self._context, launches)
            return _Runs(launches)
        except RuntimeError as error:
            raise XrtError(explain(str(error))) from error


class _PyBuffer:
    def __init__(self, module: Any, bo: Any) -> None:
        self._directions = module.xclBOSyncDirection
        self.bo = bo
        self.data: NDArray[np.uint8] = np.frombuffer(bo.map(), np.uint8)

    def to_device(self) -> None:
        self.bo.sync(self._directions.XCL_BO_SYNC_BO_TO_DEVICE)

    def from_device(self) -> None:
        self.bo.sync(self._directions.XCL_BO_SYNC_BO_FROM_DEVICE)


class _PyLaunch:
    def __init__(self, run: Any, control: Any) -> None:
        self.run = run
        self._owned: dict[int, Any] = {-1: control}

    def set_buffer(self, index: int, buffer: _PyBuffer) -> None:
        self.run.set_arg(FIRST_BUFFER + index, buffer.bo)
        self._owned[index] = buffer

    def start(self) -> None:
        self.run.start()

    def wait(self, timeout_ms: int) -> int:
        end = time.monotonic() + timeout_ms / 1000
        while (state := int(self.run.state())) in PENDING:
            if time.monotonic() > end:
                return 8
            time.sleep(POLL_SECONDS)
        return state


class _PyChain:
    """All launches but the last as a runlist, and the last behind it.

    pyxrt (2.25) waits for a runlist only without a limit and with the interpreter lock, and gives it no state. A
    context runs its commands in order: when the last launch has ended, so has the runlist, and its wait returns at
    once. Where that never happens it is never called.
    """

    def __init__(self, chain: Any, context: Any, launches: Sequence[_PyLaunch]) -> None:
        self._chain = chain  # first, so that it goes first: a runlist that outlives its context crashes
        self._context, self._launches = context, list(launches)
        for launch in launches[:-1]:
            chain.add(launch.run)
        chain.execute()
        launches[-1].start()

    def wait(self, timeout_ms: int) -> int:
        state = self._launches[-1].wait(timeout_ms)
        if state != COMPLETED:
            return state
        try:
            self._chain.wait()
        except RuntimeError as error:  # "runlist failed execution (ERT_CMD_STATE_ABORT)"
            return next((state for state, name in STATES.items() if f"STATE_{name}" in str(error)), 5)
        return COMPLETED


# --- the C wrapper ------------------------------------------------------------------------------


@dataclass
class _Handle:
    """A C++ object behind a pointer, freed with the last reference."""

    library: ctypes.CDLL
    pointer: int
    free: str
    keep: Any = None  # what must outlive it

    def __del__(self) -> None:
        getattr(self.library, self.free)(ctypes.c_void_p(self.pointer))


class CXrt:
    """libxrt through `libunicorn_xrt.so`; every call of ctypes releases the interpreter lock."""

    def __init__(self, path: Path, index: int = 0) -> None:
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise XrtError(f"{path} does not load: {error}; build it again (docs/npu.md)") from error
        if not hasattr(library, "unicorn_xrt_chain"):
            raise XrtError(f"{path} was built from earlier sources: build it again (docs/npu.md)")
        for name in ("open", "context", "buffer", "map", "launch", "chain"):
            getattr(library, f"unicorn_xrt_{name}").restype = ctypes.c_void_p
        library.unicorn_xrt_error.restype = library.unicorn_xrt_name.restype = ctypes.c_char_p
        self._device = _made(library, library.unicorn_xrt_open(index), "unicorn_xrt_close")
        self.name = library.unicorn_xrt_name(ctypes.c_void_p(self._device.pointer)).decode()
        self.label = _label(self.name, "libxrt", True)

    def context(self, artifact: Artifact) -> _CContext:
        return _CContext(self._device, artifact)


class _CContext:
    def __init__(self, device: _Handle, artifact: Artifact) -> None:
        library = device.library
        words = (artifact.folder / INSTRUCTIONS).read_bytes()
        made = library.unicorn_xrt_context(
            ctypes.c_void_p(device.pointer), str(artifact.folder / XCLBIN).encode(), words, ctypes.c_size_t(len(words))
        )
        self._handle = _made(library, made, "unicorn_xrt_context_free", device)

    def buffer(self, index: int, size: int) -> _CBuffer:
        return _CBuffer(self._handle, index, size)

    def launch(self, buffers: Sequence[_CBuffer]) -> _CLaunch:
        return _CLaunch(self._handle, buffers)

    def start(self, launches: Sequence[_CLaunch]) -> Started:
        return _CChain(self._handle, launches) if len(launches) > 1 else _Runs(launches)


class _CBuffer:
    def __init__(self, context: _Handle, index: int, size: int) -> None:
        library = context.library
        made = library.unicorn_xrt_buffer(ctypes.c_void_p(context.pointer), index, ctypes.c_size_t(size))
        self.handle = _made(library, made, "unicorn_xrt_buffer_free", context)
        address = library.unicorn_xrt_map(ctypes.c_void_p(self.handle.pointer))
        if not address:
            raise XrtError(explain(library.unicorn_xrt_error().decode()))
        self.data: NDArray[np.uint8] = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def to_device(self) -> None:
        self._sync(1)

    def from_device(self) -> None:
        self._sync(0)

    def _sync(self, to_device: int) -> None:
        library = self.handle.library
        if library.unicorn_xrt_sync(ctypes.c_void_p(self.handle.pointer), to_device):
            raise XrtError(explain(library.unicorn_xrt_error().decode()))


class _CLaunch:
    def __init__(self, context: _Handle, buffers: Sequence[_CBuffer]) -> None:
        library = context.library
        made = library.unicorn_xrt_launch(ctypes.c_void_p(context.pointer), len(buffers))
        self.handle = _made(library, made, "unicorn_xrt_launch_free", context)
        self._owned: dict[int, _CBuffer] = {}
        for index, buffer in enumerate(buffers):
            self.set_buffer(index, buffer)

    def set_buffer(self, index: int, buffer: _CBuffer) -> None:
        self._check(
            self.handle.library.unicorn_xrt_set(
                ctypes.c_void_p(self.handle.pointer), index, ctypes.c_void_p(buffer.handle.pointer)
            )
        )
        self._owned[index] = buffer

    def start(self) -> None:
        self._check(self.handle.library.unicorn_xrt_start(ctypes.c_void_p(self.handle.pointer)))

    def wait(self, timeout_ms: int) -> int:
        return int(self.handle.library.unicorn_xrt_wait(ctypes.c_void_p(self.handle.pointer), timeout_ms))

    def _check(self, failed: int) -> None:
        if failed:
            raise XrtError(explain(self.handle.library.unicorn_xrt_error().decode()))


class _CChain:
    """Launches as one runlist."""

    def __init__(self, context: _Handle, launches: Sequence[_CLaunch]) -> None:
        library = context.library
        self._launches = list(launches)
        runs = (ctypes.c_void_p * len(launches))(*(launch.handle.pointer for launch in launches))
        made = library.unicorn_xrt_chain(ctypes.c_void_p(context.pointer), runs, len(launches))
        self._handle = _made(library, made, "unicorn_xrt_chain_free", context)

    def wait(self, timeout_ms: int) -> int:
        return int(self._handle.library.unicorn_xrt_chain_wait(ctypes.c_void_p(self._handle.pointer), timeout_ms))


def _made(library: ctypes.CDLL, pointer: int | None, free: str, keep: Any = None) -> _Handle:
    if not pointer:
        raise XrtError(explain(library.unicorn_xrt_error().decode()))
    return _Handle(library, pointer, free, keep)


# --- which one ----------------------------------------------------------------------------------


def find_xrt(folder: Path, index: int = 0) -> Xrt | str:
    """The NPU through whatever reaches it, or why there is none. `folder`: where a built C wrapper lies."""
    reasons = []
    wrapper = folder / WRAPPER
    if wrapper.is_file():
        try:
            return CXrt(wrapper, index)
        except XrtError as error:
            reasons.append(f"libxrt: {error}")
    try:
        module = importlib.import_module("pyxrt")
    except ImportError as error:
        reasons.append(f"pyxrt: {error}")
    else:
        try:
            return PyXrt(module, "pyxrt", index)
        except XrtError as error:
            reasons.append(f"pyxrt: {error}")
    return "; ".join(reasons)
