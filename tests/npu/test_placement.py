"""Which regions the NPU takes, by estimate or by this machine's figures."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from unicorn_backend.plan import Step
from unicorn_backend.runtime.device import Work
from unicorn_backend.runtime.npu import cost
from unicorn_backend.runtime.npu.device import NpuDevice, target_of


def device(name: str, root: Path, emulated: bool = False) -> NpuDevice:
    xrt: Any = SimpleNamespace(name=name, label=f"{name} through nothing")
    return NpuDevice(xrt, root, emulated)


def work(tokens: str, op: str = "int8_attention", policy: str = "speed", **changes: Any) -> Work:
    step = Step("attention", "layer", f"unicorn::{op}", "cpu", changes.get("schemes", ("w8c",)), 0)
    return Work(step, tokens, changes.get("constants", {"softcap": 0.0}), changes.get("whole", True), policy)


def test_decode_stays_long_prompts_go(tmp_path: Path) -> None:
    """XDNA 2: from 256 tokens. XDNA 1: only where the caller asks for power. Decode: never."""
    first, second = device("RyzenAI-npu1", tmp_path), device("RyzenAI-npu4", tmp_path)
    for policy in ("speed", "power"):
        assert "1 tokens per call" in second.refuses(work("1", policy=policy))
    assert second.refuses(work("512")) == "" and second.refuses(work("dynamic")) == ""
    assert "128 tokens per call; it takes 256" in second.refuses(work("128"))
    assert "not measured" in first.refuses(work("2048")) and "policy='power'" in first.refuses(work("2048"))
    assert first.refuses(work("512", policy="power")) == ""
    assert device("RyzenAI-npu1", tmp_path, emulated=True).refuses(work("2")) == ""


def test_what_it_has_no_kernel_for(tmp_path: Path) -> None:
    npu = device("RyzenAI-npu4", tmp_path)
    assert "has kernels for" in npu.refuses(work("512", op="int4_ffn"))
    assert "row ranges" in npu.refuses(work("512", whole=False))
    assert "w4g32" in npu.refuses(work("512", schemes=("w4g32",)))
    assert "softcap" in npu.refuses(work("512", constants={"softcap": 50.0}))


def test_measured_figures_replace_the_estimates(tmp_path: Path) -> None:
    """Once, for the next process too, per device; an emulator never leaves any."""
    npu = device("RyzenAI-npu1", tmp_path)
    npu.calibrate({"gemm_i8": 40.0})
    assert npu.rates.source == cost.SOURCE
    npu.calibrate({"gemm_i8": 40.0, "attention_i8": 12.0})
    again = device("RyzenAI-npu1", tmp_path)
    assert (again.rates.gemm_tops, again.rates.source) == (40.0, "measured on this machine")
    assert again.refuses(work("512")) == ""
    assert device("RyzenAI-npu4", tmp_path).rates == cost.ESTIMATES["npu2"]
    emulated = device("RyzenAI-npu4", tmp_path, emulated=True)
    emulated.calibrate({"gemm_i8": 1.0, "attention_i8": 1.0})
    assert device("RyzenAI-npu4", tmp_path).rates == cost.ESTIMATES["npu2"]
    (tmp_path / cost.FILE).write_text("{")
    assert device("RyzenAI-npu1", tmp_path).rates == cost.ESTIMATES["npu1"]


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("RyzenAI-npu1", "npu1"),
        ("NPU Phoenix", "npu1"),
        ("RyzenAI-npu5", "npu2"),
        ("NPU Strix Halo", "npu2"),
        ("x", ""),
    ],
)
def test_names_of_devices(name: str, target: str) -> None:
    assert target_of(name) == target
