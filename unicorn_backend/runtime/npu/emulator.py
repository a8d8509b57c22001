"""Stand-in for `pyxrt`: the part that the runtime uses, with the kernels compiled for this CPU behind it.

It behaves as the real module does over a kernel driver, traps included; `tests/npu/contract.py` runs on both.
Device memory is another array than the host's, so a forgotten sync shows, which coherent hosts hide. `faults` makes
it fail the ways that hardware does. Nothing that runs here is an NPU, and everything that shows it says so.
"""

from __future__ import annotations

import enum
import threading
import uuid as uuids
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unicorn_backend.runtime.npu.artifacts import LIBRARY
from unicorn_backend.runtime.npu.host_model import Launcher, aligned

GROUPS = (131071, 65537, 131071, 65536, 65536, 65536)
HEAP_BYTES = 64 << 20  # locked when the device is opened
CONTEXTS = {"npu1": 6, "npu2": 16}


@dataclass
class Faults:
    """What goes wrong from now on."""

    hang: bool = False  # commands never complete
    state: int = 0  # commands end in this state without running
    after: int = 0  # commands that do well before they hang or fail
    contexts: int | None = None  # hardware contexts that are left
    memory_bytes: int | None = None  # that may be locked
    no_firmware: bool = False  # the driver does not come up: no device
    corrupt: bool = False  # one bit of every result is wrong


faults = Faults()
generation = "npu1"


class ert_cmd_state(enum.IntEnum):
    ERT_CMD_STATE_NEW = 1
    ERT_CMD_STATE_QUEUED = 2
    ERT_CMD_STATE_RUNNING = 3
    ERT_CMD_STATE_COMPLETED = 4
    ERT_CMD_STATE_ERROR = 5
    ERT_CMD_STATE_ABORT = 6
    ERT_CMD_STATE_SUBMITTED = 7
    ERT_CMD_STATE_TIMEOUT = 8
    ERT_CMD_STATE_NORESPONSE = 9


class xclBOSyncDirection(enum.IntEnum):
    XCL_BO_SYNC_BO_TO_DEVICE = 0
    XCL_BO_SYNC_BO_FROM_DEVICE = 1


class xrt_info_device:
    bdf = 0
    name = 5


def enumerate_devices() -> int:
    return 0 if faults.no_firmware else 1


class uuid:
    def __init__(self, value: str) -> None:
        self._value = value

    def to_string(self) -> str:
        return self._value


class device:
    def __init__(self, index: int = 0) -> None:
        if index >= enumerate_devices():
            raise RuntimeError(f"No such device with index '{index}'")
        self._registered: dict[str, xclbin] = {}
        self._contexts = 0
        self._locked = HEAP_BYTES
        if faults.memory_bytes is not None and faults.memory_bytes < HEAP_BYTES:
            raise RuntimeError("DRM_IOCTL_AMDXDNA_CREATE_BO IOCTL failed (err=-11): Resource temporarily unavailable")

    def register_xclbin(self, image: xclbin) -> uuid:
        self._registered[image.get_uuid().to_string()] = image
        return image.get_uuid()

    def get_info(self, what: int) -> str:
        return f"RyzenAI-{generation}" if what == xrt_info_device.name else "0000:00:00.0"


class xclbinkernel:
    def __init__(self, name: str, count: int) -> None:
        self._name, self._count = name, count

    def get_name(self) -> str:
        return self._name

    def get_num_args(self) -> int:
        return self._count


class xclbin:
    xclbinkernel = xclbinkernel

    def __init__(self, path: str) -> None:
        data = Path(path).read_bytes()
        if len(data) < 32:
            raise RuntimeError("xclbin: buffer too small to contain header")
        if data[:7] != b"xclbin2":
            raise RuntimeError("Invalid xclbin")
        self._library = Path(path).with_name(LIBRARY)
        self._uuid = uuid(str(uuids.uuid5(uuids.NAMESPACE_OID, str(path))))

    def get_kernels(self) -> list[Any]:
        return [xclbinkernel("MLIR_AIE", len(GROUPS))]

    def get_uuid(self) -> uuid:
        return self._uuid


class hw_context:
    def __init__(self, owner: device, image: uuid) -> None:
        if image.to_string() not in owner._registered:
            raise RuntimeError("xclbin must be registered before hw context can be created")
        left = CONTEXTS[generation] if faults.contexts is None else faults.contexts
        if owner._contexts >= left:
            raise RuntimeError("DRM_IOCTL_AMDXDNA_CREATE_HWCTX IOCTL failed (err=-2): No such file or directory")
        owner._contexts += 1
        self._owner = owner
        self._launch = Launcher(owner._registered[image.to_string()]._library)
        self._hangs = False
        self._queue = ThreadPoolExecutor(1)  # commands of a context run one after another, in their order

    def __del__(self) -> None:
        if hasattr(self, "_owner"):
            self._owner._contexts -= 1


class bo:
    class flags(enum.IntEnum):
        normal = 0
        cacheable = 1
        device_only = 2
        host_only = 3
        p2p = 4
        svm = 5

    normal, cacheable, device_only, host_only, p2p, svm = flags

    def __init__(self, *arguments: Any) -> None:
        if isinstance(arguments[0], bo):
            parent, size, offset = arguments
            self._host, self._device = parent._host[offset : offset + size], parent._device[offset : offset + size]
            return
        owner, size, kind, _ = arguments
        if kind == bo.normal:
            raise RuntimeError("unsupported buffer type: none flag (err=95): Operation not supported")
        if faults.memory_bytes is not None and owner._locked + size > faults.memory_bytes:
            raise RuntimeError(
                "mmap(len=..., prot=3, flags=8193, offset=...) failed (err=-11): Resource temporarily unavailable"
            )
        owner._locked += size
        self._host, self._device = aligned(size, 0xA5), aligned(size, 0xA5)
        self._owner = owner

    def __del__(self) -> None:
        if hasattr(self, "_owner"):
            self._owner._locked -= self._host.size

    def map(self) -> memoryview:
        return memoryview(self._host)

    def size(self) -> int:
        return int(self._host.size)

    def write(self, data: NDArray[Any], seek: int = 0) -> None:
        raw = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
        self._host[seek : seek + raw.size] = raw

    def read(self, size: int, skip: int) -> NDArray[np.int8]:
        part: NDArray[np.int8] = self._host[skip : skip + size].view(np.int8).copy()
        return part

    def sync(self, direction: int, size: int | None = None, offset: int = 0) -> None:
        part = slice(offset, self._host.size if size is None else offset + size)
        if direction == xclBOSyncDirection.XCL_BO_SYNC_BO_TO_DEVICE:
            self._device[part] = self._host[part]
        else:
            self._host[part] = self._device[part]


class kernel:
    def __init__(self, context: hw_context, name: str) -> None:
        if name != "MLIR_AIE":
            raise RuntimeError(f"No such kernel '{name}': Invalid argument")
        self._context = context

    def group_id(self, argument: int) -> int:
        return GROUPS[argument]

    def __call__(self, *arguments: Any) -> run:
        made = run(self)
        for index, value in enumerate(arguments):
            made.set_arg(index, value)
        made.start()
        return made


class run:
    def __init__(self, of: kernel) -> None:
        self._context = of._context
        self._arguments: dict[int, Any] = {}
        self._state = ert_cmd_state.ERT_CMD_STATE_NEW
        self._done = threading.Event()
        self._list: weakref.ref[runlist] | None = None

    def set_arg(self, index: int, value: Any) -> None:
        if index >= len(GROUPS):
            raise SystemError(f"set_arg({index}) past the declared arguments: the real module crashes here")
        if not isinstance(value, bo):
            if isinstance(value, float) or not -(2**31) <= int(value) < 2**32:
                raise TypeError("set_arg(): incompatible function arguments")
            value = int(value)
        self._arguments[index] = value

    def start(self) -> None:
        if self._list is not None and self._list() is not None:
            raise RuntimeError("Run object belongs to a runlist and cannot be explicitly started: Invalid argument")
        self._reset()
        self._context._queue.submit(self._execute)

    def _reset(self) -> None:
        self._done.clear()
        self._state = ert_cmd_state.ERT_CMD_STATE_NEW

    def _execute(self) -> None:
        well = faults.after > 0
        faults.after -= well
        self._context._hangs |= faults.hang and not well
        if not self._context._hangs:
            self._end(faults.state if faults.state and not well else self._run())

    def _end(self, state: int) -> None:
        self._state = ert_cmd_state(state)
        self._done.set()

    def _run(self) -> int:
        given = self._arguments
        if sorted(given) != list(range(len(GROUPS))) or given[0] != 3:
            return ert_cmd_state.ERT_CMD_STATE_ERROR
        instructions = given[1]._device.view(np.uint32)[: given[2]]
        buffers = [given[i]._device for i in range(3, len(GROUPS))]
        if self._context._launch(instructions, buffers):
            return ert_cmd_state.ERT_CMD_STATE_ERROR
        if faults.corrupt:
            buffers[-1][buffers[-1].size // 3] ^= 1
        return ert_cmd_state.ERT_CMD_STATE_COMPLETED

    def state(self) -> ert_cmd_state:
        return self._state

    def wait(self, timeout_ms: int = 0) -> ert_cmd_state:
        finished = self._done.wait(timeout_ms / 1000 if timeout_ms else None)
        return self._state if finished else ert_cmd_state.ERT_CMD_STATE_TIMEOUT

    def wait2(self) -> None:
        if self.wait() != ert_cmd_state.ERT_CMD_STATE_COMPLETED:
            raise RuntimeError(f"Command failed to complete successfully ({self._state.name})")


class runlist:
    def __init__(self, context: hw_context) -> None:
        self._context = context
        self._runs: list[run] = []
        self._done = threading.Event()
        self._done.set()

    def add(self, one: run) -> None:
        if one._context is not self._context:
            raise RuntimeError("runlist hwctx and run object hwctx mismatch")
        one._list = weakref.ref(self)
        self._runs.append(one)

    def execute(self) -> None:
        if not self._done.is_set():
            raise RuntimeError("runlist must be idle before submitting for execution, current state: running")
        self._done.clear()
        for one in self._runs:
            one._reset()
        self._context._queue.submit(_chain, self._runs, self._done)

    def wait(self) -> None:
        """Without a limit, as the real one: waiting for a time is a TypeError there."""
        self._done.wait()
        failed = [one._state for one in self._runs if one._state != ert_cmd_state.ERT_CMD_STATE_COMPLETED]
        if failed:
            raise RuntimeError(f"runlist failed execution ({failed[0].name})")


def _chain(runs: Sequence[run], done: threading.Event) -> None:
    """The first that fails ends all that follow."""
    failed = False
    for one in runs:
        if failed:
            one._end(ert_cmd_state.ERT_CMD_STATE_ABORT)
        else:
            one._execute()
            if not one._done.is_set():
                return
            failed = one._state != ert_cmd_state.ERT_CMD_STATE_COMPLETED
    done.set()
