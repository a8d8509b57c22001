"""Host-compiled kernels, built once per session and design, and devices of a test's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from unicorn_backend.runtime import close_devices
from unicorn_backend.runtime.npu import designs, emulator, host_model

Launch = Callable[[designs.Design, list[NDArray[np.uint8]]], NDArray[np.uint8]]


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """(design, inputs) -> the bytes that one launch of the host-compiled kernel writes."""
    folder: Path = tmp_path_factory.mktemp("host-model")
    built: dict[tuple[object, ...], host_model.Launcher] = {}

    def run(design: designs.Design, inputs: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
        key = (design.kind, design.target, *design.defines.values())
        if key not in built:
            library = folder / f"{'-'.join(map(str, key))}.so"
            host_model.compile_design(design, library)
            built[key] = host_model.Launcher(library)
        buffers = [host_model.aligned(size, fill=0xA5) for size in design.buffer_bytes]
        for buffer, data in zip(buffers, inputs, strict=False):
            buffer[:] = data
        error = built[key](np.array(design.instruction, np.uint32), buffers)
        assert not error, error
        return buffers[-1]

    return run


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tests of a module build and look for kernels."""
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def clean(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No device is open, before and after; the emulator has no faults."""
    monkeypatch.setenv("UNICORN_NPU_KERNELS", str(kernels))
    monkeypatch.setattr(emulator, "faults", emulator.Faults())
    close_devices()
    yield
    close_devices()


@pytest.fixture
def emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNICORN_NPU_EMULATE", "1")
