"""The benchmark runs, and a software driver's times are never called performance."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.runtime import drivers
from tests.scripts import ROOT, load


def test_software_is_marked_and_gets_no_rates() -> None:
    drivers.physical("llvmpipe")
    sizes = ["--region", "ffn", "qkv", "--tokens", "1", "2", "--rounds", "1", "--layers", "2", "--peak-tops", "16"]
    command = [sys.executable, "benchmarks/vulkan_shaders.py", *sizes]
    done = subprocess.run(
        command, cwd=ROOT, env=drivers.environment("llvmpipe"), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["software"] is True and "no measurement of a GPU" in result["note"]
    assert set(result) == {"model", "device", "software", "note", "regions"}, "no bandwidth either"
    assert [region["region"] for region in result["regions"]] == ["ffn", "qkv"]
    for region, stages in zip(result["regions"], (4, 3), strict=True):
        (found,) = region["variants"]
        assert found["variant"] == "dot8_subgroup"
        assert [row["tokens"] for row in found["rows"]] == [1, 2]
        for row in found["rows"]:
            assert set(row) == {"tokens", "us"}, "neither GB/s nor TOPS"
            assert len(row["us"]) == stages and all(us > 0 for us in row["us"].values())


def test_what_a_gpu_would_get() -> None:
    """The arithmetic, with times that nobody measured."""
    drivers.physical("llvmpipe")
    benchmark = load(ROOT / "benchmarks" / "vulkan_shaders.py")
    ffn = benchmark.region_of("gemma3-1b", "ffn")()
    us = {"norm_quant": 1.0, "gate_up": 100.0, "down": 50.0, "norm_add": 1.0}
    found = benchmark.rates(ffn, us, 64, benchmark.Ceiling(100.0, 50.0))
    down = 1152 * 6912
    assert found["gb_per_s"]["down"] == pytest.approx(down * 4.5 / 8 / 50e3)
    assert found["tops"]["down"] == pytest.approx(2 * down * 64 / 50e6)
    assert found["of_copy"]["down"] == pytest.approx(found["gb_per_s"]["down"] / 100)
    assert found["of_peak"]["gate_up"] == pytest.approx(found["tops"]["gate_up"] / 50)
    assert set(benchmark.rates(ffn, us, 64, benchmark.Ceiling(None, None))) == {"gb_per_s", "tops"}


def test_copies_are_timed() -> None:
    from unicorn_backend.runtime.vulkan.logical import LogicalDevice

    logical = LogicalDevice(drivers.physical("llvmpipe"))
    logical.open_queue()
    benchmark = load(ROOT / "benchmarks" / "vulkan_shaders.py")
    benchmark.COPIED_BYTES = 1 << 20
    rates = benchmark.copy_rates(logical, 2)
    assert set(rates) == {"shader", "vkCmdCopyBuffer"} and min(rates.values()) > 0
    assert logical.used == 0
    logical.close()
