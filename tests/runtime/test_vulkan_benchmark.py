"""The benchmark runs, and a software driver's times are never called performance."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.runtime import drivers


@pytest.mark.parametrize("region", ["ffn", "qkv"])
def test_software_is_marked_and_gets_no_rates(region: str) -> None:
    drivers.physical("llvmpipe")
    sizes = ["--region", region, "--tokens", "1", "2", "--rounds", "1", "--layers", "2"]
    command = [sys.executable, "benchmarks/vulkan_shaders.py", *sizes]
    done = subprocess.run(
        command, cwd=drivers.ROOT, env=drivers.environment("llvmpipe"), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["software"] is True and "no measurement of a GPU" in result["note"]
    assert [row["tokens"] for row in result["rows"]] == [1, 2]
    for row in result["rows"]:
        assert len(row["us"]) == {"ffn": 4, "qkv": 3}[region]
        assert set(row) == {"tokens", "us"}, "neither GB/s nor TOPS"
        assert all(us > 0 for us in row["us"].values())
