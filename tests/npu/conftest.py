"""Host-compiled kernels, built once per session and design."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from unicorn_backend.runtime.npu import designs, host_model

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
