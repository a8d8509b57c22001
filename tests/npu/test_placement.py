"""Which regions the NPU takes, by estimate or by this machine's figures."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.fx import Graph

from unicorn_backend.partition.cost import Rates, estimate, microseconds
from unicorn_backend.partition.place import Offer, _overlap, offer
from unicorn_backend.plan import Plan, Step
from unicorn_backend.runtime.device import Work
from unicorn_backend.runtime.npu import cost
from unicorn_backend.runtime.npu.device import NpuDevice, target_of
from unicorn_backend.runtime.placed import Site


def device(name: str, root: Path, emulated: bool = False) -> NpuDevice:
    xrt: Any = SimpleNamespace(name=name, label=f"{name} through nothing")
    return NpuDevice(xrt, root, emulated)


CPU = estimate(8, "avx512vnni")


def work(op: str = "int8_attention", **changes: Any) -> Work:
    """The attention region of a layer of Gemma 3 4B."""
    costs = {"key_macs": 2 * 8 * 256, "key_heads": 8, "key_bytes": 2 * 4 * 256 * 2, "kv_heads": 4}
    schemes = changes.get("schemes", ("w8c",))
    step = Step(
        "attention", "layer", f"unicorn::{op}", "cpu", schemes, 0, weights=(2560 * 2048,) * len(schemes), **costs
    )
    return Work(step, changes.get("constants", {"softcap": 0.0}), changes.get("whole", True))


def placed(npu: NpuDevice, tokens: str, policy: str = "speed", cpu: Rates = CPU) -> Offer:
    return offer("npu", npu, work(), Plan(1, tokens), policy, cpu, {"npu": math.inf})


def test_decode_stays_long_prompts_go(tmp_path: Path) -> None:
    """XDNA 2: prompts. XDNA 1: not beside a fast CPU, but for power. Decode: never."""
    first, second = device("RyzenAI-npu1", tmp_path), device("RyzenAI-npu4", tmp_path)
    for policy in ("speed", "power", "fixed"):
        assert "1 tokens per call; it takes 32" in placed(second, "1", policy).reason
    speed, power = placed(second, "dynamic"), placed(second, "dynamic", "power")
    assert speed.device is second and power.device is second and 32 <= power.least < speed.least <= 512
    assert f"from {speed.least} tokens on" in speed.reason and "not measured" in speed.reason
    fast = estimate(16, "avx512vnni")
    slow = placed(first, "dynamic", cpu=fast)
    assert slow.device is None and "ms: " in slow.reason and slow.us is not None
    assert placed(first, "512", "power", fast).device is first and placed(first, "512", "fixed").device is first
    emulated = placed(device("RyzenAI-npu1", tmp_path, emulated=True), "dynamic")
    assert emulated.device is not None and emulated.least == 2


def chunked(npu: NpuDevice, attention_us: float | None, tokens: str) -> Step:
    """The attention's step after `_overlap`, beside a feed-forward on the CPU."""
    graph = Graph()
    attention = graph.call_function(torch.ops.unicorn.int8_attention.default, ())
    nothing: list[Any] = [[] for _ in torch.ops.unicorn.int4_ffn.default._schema.arguments[1:]]
    ffn = graph.call_function(torch.ops.unicorn.int4_ffn.default, (attention, *nothing))
    known = () if attention_us is None else (("npu", attention_us),)
    first = dataclasses.replace(work().step, device="npu", reason="it wins", predicted_us=known)
    second = Step("ffn", "layer", "unicorn::int4_ffn", "cpu", ("w4g32",) * 3, 0, weights=(2560 * 10240,) * 3)
    plan = Plan(1, tokens, [first, second])
    _overlap({attention: Site("int8_attention", npu, plan, 0)}, plan, [attention, ffn], CPU)
    return plan.steps[0]


def test_the_overlap_is_predicted_and_shown(tmp_path: Path) -> None:
    """Four chunks of 512 tokens: of the shorter region all but one are hidden."""
    npu = device("RyzenAI-npu1", tmp_path)
    ffn = Step("ffn", "layer", "unicorn::int4_ffn", "cpu", ("w4g32",) * 3, 0, weights=(2560 * 10240,) * 3)
    part, whole = (microseconds(ffn, tokens, 512, CPU) for tokens in (128, 512))
    assert part is not None and whole is not None and 4 * part >= whole
    for us in (part, 40 * part):
        step = chunked(npu, us, "dynamic")
        want = us / 4 + 3 * max(us / 4, part) + part
        assert step.together_us == pytest.approx(want) and want < us + 4 * part
        assert (
            f"{want / 1e3:.2f} ms predicted for both at 512 tokens, {(us + whole) / 1e3:.2f} one after" in step.reason
        )
    for step in (chunked(npu, None, "dynamic"), chunked(npu, 1e3, "200")):
        assert step.together_us is None and step.reason.endswith("in chunks beside the feed-forward")


def test_what_it_has_no_kernel_for(tmp_path: Path) -> None:
    npu = device("RyzenAI-npu4", tmp_path)
    assert "has kernels for" in npu.refuses(work(op="int4_ffn"))
    assert "row ranges" in npu.refuses(work(whole=False))
    assert "w4g32" in npu.refuses(work(schemes=("w4g32",)))
    assert "softcap" in npu.refuses(work(constants={"softcap": 50.0}))


def test_measured_figures_replace_the_estimates(tmp_path: Path) -> None:
    """Once, for the next process too, per device; an emulator never leaves any."""
    npu = device("RyzenAI-npu1", tmp_path)
    npu.calibrate({"gemm_i8": 40.0})
    assert npu.rates.source == cost.SOURCE
    npu.calibrate({"gemm_i8": 40.0, "attention_i8": 12.0})
    again = device("RyzenAI-npu1", tmp_path)
    assert (again.rates.gemm_tops, again.rates.source) == (40.0, "measured on this machine")
    assert placed(again, "512").device is again
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
