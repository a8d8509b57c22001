"""Cooperative matrices on a software driver that has them, under the validation layer.

Debian 12's has not: `python3 shaders/newer_debian.py` fetches one. It multiplies 8 x 8 x 8; what RDNA3's 16 x 16 x 16
compile to is in test_vulkan_validation.py.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.runtime import drivers
from tests.runtime.test_vulkan_validation import layer_environment

SUITE = "forky"


def test_bounds_self_test_and_no_messages(tmp_path: Path) -> None:
    errors, found = scenario("matrix", tmp_path)
    assert "cooperative matrices are not used: bad matrices" in errors
    assert found == ""


def test_the_layer_knows_matrices(tmp_path: Path) -> None:
    _, found = scenario("unsupported", tmp_path)
    assert "VUID-RuntimeSpirv-OpTypeCooperativeMatrixKHR-10163" in found and "rows: 16, cols: 16" in found


def scenario(name: str, tmp_path: Path) -> tuple[str, str]:
    """What it prints to stderr, and what the layer reports."""
    newer = drivers.newer_debian()
    if newer.root(SUITE) is None:
        pytest.skip(f"no driver with cooperative matrices ({newer.INSTALL})")
    pytest.importorskip("vulkan", reason="no Python package 'vulkan'", exc_type=(ImportError, OSError))
    report = tmp_path / "report.txt"
    env = drivers.only(newer.driver(SUITE, "lvp")) | {"VK_LAYER_PATH": newer.layers(SUITE)}
    env |= layer_environment(tmp_path, report, {"validate_sync": "true"})
    command = [*newer.command(SUITE, sys.executable), "-m", "tests.runtime.vulkan_scenario", name]
    done = subprocess.run(command, cwd=drivers.ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.stdout.endswith("done\n"), done.stdout + done.stderr
    return done.stderr, report.read_text() if report.exists() else ""


def test_which_devices_get_matrices() -> None:
    physical: Any = drivers.physical("llvmpipe")
    from unicorn_backend.runtime.vulkan import variants
    from unicorn_backend.runtime.vulkan.physical import MatrixShape

    matrix = variants.VARIANTS[0]
    assert matrix.matrix

    def missing(size: int, *shapes: tuple[int, int, int], shared_bytes: int = 32 << 10) -> str:
        found = tuple(MatrixShape(*shape) for shape in shapes)
        changes = {"matrices": found, "subgroup_size": size, "shared_bytes": shared_bytes}
        return matrix.missing(dataclasses.replace(physical.features, **changes))

    for size, shape in ((32, (16, 16, 16)), (32, (16, 16, 32)), (8, (8, 8, 8)), (16, (8, 16, 32))):
        assert missing(size, shape) == ""
    assert missing(32, (16, 8, 32), (16, 16, 32)) == "", "the first that fits"
    assert missing(32) == "no cooperative matrices of int8 with int32 sums"
    assert missing(64, (16, 16, 16)) == "cooperative matrices of 16x16x16 with subgroups of 64"
    assert "16x16x64" in missing(32, (16, 16, 64))
    assert "20480 bytes of shared memory" in missing(32, (16, 16, 16), shared_bytes=20 << 10)
