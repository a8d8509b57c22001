"""The kernels compiled for this CPU against the host model of aie_api: `kernels/host`.

What stands behind the emulator. Needs a checkout of the repository and a C++ compiler; nothing of it is a device.
"""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unicorn_backend.errors import UnicornError
from unicorn_backend.runtime.npu import artifacts
from unicorn_backend.runtime.npu.artifacts import KERNELS, Artifact
from unicorn_backend.runtime.npu.designs import Design

FLAGS = ("-std=c++20", "-O3", "-march=native", "-shared", "-fPIC", "-Wall", "-Wextra")


class HostModelError(UnicornError, RuntimeError):
    """The host model is not at hand or does not compile."""


def compile_design(design: Design, library: Path) -> None:
    """Build the launcher of `design` as `library`, atomically."""
    source = KERNELS / "host" / "launch.cc"
    if not source.is_file():
        raise HostModelError(f"{source} is missing: the NPU emulator needs a checkout of the repository")
    defines = {"__AIE_ARCH__": design.generation.architecture, **design.defines}
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        command = [os.environ.get("CXX", "g++"), *FLAGS, f"-I{KERNELS / 'host'}", str(source), "-o", str(built)]
        command += [f"-D{name}={value}" for name, value in defines.items()]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise HostModelError(f"the NPU emulator needs a C++ compiler: {error}") from error
        if done.returncode:
            raise HostModelError(f"the host model does not compile:\n{done.stderr}")
        built.rename(library)


def build(design: Design, root: Path, container: Callable[[Path], None] | None = None) -> Artifact:
    """The artifact of `design` for the emulator: same sources, this CPU. Raises HostModelError.

    container: writes another kernel.xclbin into the folder than the one that the emulator reads.
    """

    def make(folder: Path) -> None:
        compile_design(design, folder / artifacts.LIBRARY)
        (folder / artifacts.INSTRUCTIONS).write_bytes(struct.pack("<8I", *design.instruction))
        (folder / artifacts.XCLBIN).write_bytes(b"xclbin2\0" + b"for the emulator: nothing in here runs on hardware\n")
        if container is not None:
            container(folder)

    return artifacts.write(root, design, artifacts.HOST_MODEL, make)


class Launcher:
    """`unicorn_launch` of a compiled design. Calls run without the GIL."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._call = self._library.unicorn_launch
        self._call.restype = ctypes.c_int

    def __call__(self, instructions: NDArray[np.uint32], buffers: list[NDArray[np.uint8]]) -> str:
        """Run one launch on `buffers` in place; the error, or "" if there is none."""
        pointers = (ctypes.c_void_p * len(buffers))(*(b.ctypes.data for b in buffers))
        sizes = (ctypes.c_uint64 * len(buffers))(*(b.nbytes for b in buffers))
        error = ctypes.create_string_buffer(256)
        code = self._call(
            ctypes.c_void_p(instructions.ctypes.data),
            ctypes.c_uint32(len(instructions)),
            pointers,
            sizes,
            ctypes.c_uint32(len(buffers)),
            error,
            ctypes.c_uint64(256),
        )
        return error.value.decode() if code else ""


def aligned(size: int, fill: int = 0) -> NDArray[np.uint8]:
    """`size` bytes that start on a page, as device memory does."""
    raw = np.full(size + 4096, fill, np.uint8)
    offset = -raw.ctypes.data % 4096
    return raw[offset : offset + size]
