"""The Vulkan device around its shaders: choice, memory, caches, failures, leaks, threads, forks, a whole model."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import unicorn_backend
from tests.runtime import drivers
from tests.runtime.test_vulkan_ffn import arguments, run
from tests.runtime.vulkan_cycles import cycles
from tests.test_compile_cache import make  # the embedded model cut to two layers
from unicorn_backend import runtime
from unicorn_backend.partition import calibration
from unicorn_backend.partition.cost import ESTIMATED
from unicorn_backend.plan import Step
from unicorn_backend.runtime.device import Work
from unicorn_backend.table import size

NAME = f"vulkan:{drivers.NAMES[0]}"
NEW = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module")
def physical() -> Any:
    return drivers.physical(drivers.NAMES[0])


@pytest.fixture
def device(physical: Any) -> Iterator[Any]:
    """The device as options open it, and nobody else's."""
    runtime.close_devices()
    opened = runtime.open_device(NAME)
    assert not isinstance(opened, str), opened
    yield opened
    runtime.close_devices()


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def test_generate_and_a_device_that_is_lost_meanwhile(
    device: Any, sample_ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    from unicorn_backend.runtime.vulkan.api import VulkanError
    from unicorn_backend.runtime.vulkan.logical import LogicalDevice

    ids, model = sample_ids[:, :23], make()

    def tokens(**options: Any) -> list[int]:
        torch._dynamo.reset()
        compiled: Any = torch.compile(model, backend="unicorn", options=options)
        return [int(t) for t in compiled.generate(ids, attention_mask=torch.ones_like(ids), **NEW)[0]]

    want = tokens()
    if not device.software:
        tokens(devices=["cpu", NAME], policy="fixed")  # weights are copied to the device: submits of their own
    submits = []
    plain = LogicalDevice.submit

    def submit(self: Any, *args: Any, **kwargs: Any) -> None:
        submits.append(1)
        if len(submits) == 5 * NEW["max_new_tokens"] + 5:
            raise VulkanError("vkQueueSubmit", -4)
        plain(self, *args, **kwargs)

    monkeypatch.setattr(LogicalDevice, "submit", submit)
    if device.software:
        assert tokens(devices=["cpu", NAME]) == want and not submits
        assert "policy='fixed'" in str(unicorn_backend.explain(model)), "a software driver is never preferred"
    assert tokens(devices=["cpu", NAME], policy="fixed") == want
    assert len(submits) == 5 * NEW["max_new_tokens"], "two submits per layer and token, and one for the head"
    explanation = unicorn_backend.explain(model)
    steps = [s for plan in explanation.plans[-2:] for s in plan.steps]
    there = [s for s in steps if s.kind in ("ffn", "linear", "qkv")]
    assert {(s.device, s.reason) for s in there} == {(NAME, device.label)}
    assert {s.schemes for s in there} == {("w4g32",) * 3, ("w8c",) * 3, ("w8a",)}
    reasons = {s.reason for s in steps if s.kind == "attention"}
    assert len(reasons) == 1 and "keys and values are in the CPU's cache" in reasons.pop()
    assert ("not a GPU" in device.label) == device.software
    memory = device.memory()
    pages = sum(-(-s.weight_bytes // 4096) * 4096 for s in there) // 2
    if device.physical.kind == "discrete":
        assert memory.shared == 0 and memory.used > pages
    else:
        assert pages <= memory.shared < pages + 32 * 4096, "weights are not copied, the head's, which embeds, neither"
    assert f"{NAME}: {size(sum(s.weight_bytes for s in there) // 2)} of weights" in str(explanation)

    got = model.generate(ids, attention_mask=torch.ones_like(ids), **NEW)[0]
    assert [int(t) for t in got] == want, "lost in the middle, and the same tokens"
    assert "vkQueueSubmit returned VK_ERROR_DEVICE_LOST" in device.lost
    assert f"goes back to the cpu: {NAME}: the device is lost" in caplog.text
    steps = [s for plan in unicorn_backend.explain(model).plans[-2:] for s in plan.steps if s.kind == "ffn"]
    assert "cpu" in {s.device for s in steps}


def test_swiglu_through_torch_compile() -> None:
    drivers.physical(drivers.NAMES[-1])

    class SwiGlu(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = nn.Linear(96, 224, bias=False), nn.Linear(96, 224, bias=False)
            self.down = nn.Linear(224, 96, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))
            return y

    runtime.close_devices()
    module = SwiGlu().eval()
    with torch.no_grad():
        compiled = torch.compile(
            module,
            backend="unicorn",
            options={"recipe": "default", "devices": f"vulkan:{drivers.NAMES[-1]}", "policy": "fixed"},
        )
        for tokens in (1, 5, 67):
            x = torch.randn(tokens, 96)
            want = torch.compile(module, backend="unicorn", options={"recipe": "default"})(x)
            assert (compiled(x) - want).square().mean() <= 1e-6 * want.square().mean()
    plans = unicorn_backend.explain(module).plans
    assert {f"vulkan:{drivers.NAMES[-1]}", "cpu"} == {s.device for plan in plans for s in plan.steps}
    runtime.close_devices()


def test_choosing_a_device(physical: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from unicorn_backend.runtime.vulkan import physical as p

    gpu = dataclasses.replace(physical, name="AMD Radeon 780M (RADV PHOENIX)", kind="integrated", uuid="ab-cd")
    physical = dataclasses.replace(physical, kind="software")
    found = [physical, gpu, dataclasses.replace(gpu, name="AMD Radeon RX", kind="discrete", uuid="ab-ce")]
    assert p.choose(found, "") is found[2] and p.choose(found[:2], "") is gpu
    assert p.choose(found, "1") is gpu and p.choose(found, "780m") is gpu and p.choose(found, "AB-CD") is gpu
    missing = p.choose(found, "890M")
    assert isinstance(missing, str) and "no device is called '890M'" in missing and "1: AMD Radeon 780M" in missing
    assert "mesa-vulkan-drivers" in str(p.choose([], ""))
    assert p.choose([physical], "") is physical  # VK_ICD_FILENAMES names the driver
    for variable in ("VK_ICD_FILENAMES", "VK_DRIVER_FILES"):
        monkeypatch.delenv(variable, raising=False)
    assert "only software drivers" in str(p.choose([physical], ""))
    assert p.choose([dataclasses.replace(gpu, missing="compute queue")], "") == f"{gpu.name} has no compute queue"


def test_a_choice_of_variants_can_be_printed(physical: Any) -> None:
    from unicorn_backend.runtime.vulkan import variants

    text = variants.explain_choice(physical.features)
    assert [line.split()[0] for line in text.splitlines()] == [v.name for v in variants.VARIANTS]
    no_matrices, taken, *others = text.splitlines()  # Debian 12's driver has none; newer ones do
    assert no_matrices.endswith(("taken", "no cooperative matrices of int8 with int32 sums"))
    assert taken.endswith(("taken", "not needed")) and others[-1].endswith("not needed")
    assert [line.endswith("taken") for line in text.splitlines()].count(True) == 1


def test_a_wrong_result_in_the_self_test_refuses_the_device(physical: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from unicorn_backend.runtime.vulkan import ffn

    plain = ffn.norm_scale
    monkeypatch.setattr(ffn, "norm_scale", lambda w, offset, width: plain(w, offset + 0.01, width))
    runtime.close_devices()
    refused = runtime.open_device(NAME)
    assert isinstance(refused, str) and "self-test failed: int4_ffn of 1 tokens differs from the CPU's" in refused
    runtime.close_devices()


def test_memory_is_asked_for_before_it_is_taken(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(2, 64, 96, 64)
    before = device.memory()
    monkeypatch.setattr(type(device._device), "free_bytes", lambda self: 64 << 20)
    assert "out of memory: it needs" in device.region("int4_ffn", args)
    assert (device.memory().used, device.memory().shared) == (before.used, before.shared)


def test_an_allocation_that_fails_all_the_same_is_a_reason(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from unicorn_backend.runtime.vulkan import logical
    from unicorn_backend.runtime.vulkan.api import VulkanError, call

    left = [3]

    def limited(function: str, *args: Any) -> None:
        if function == "vkAllocateMemory":
            left[0] -= 1
            if left[0] < 0:
                raise VulkanError(function, -2)
        call(function, *args)

    before = device.memory().used
    monkeypatch.setattr(logical, "call", limited)
    assert (
        device.region("int4_ffn", arguments(2, 64, 96, 64)) == "vkAllocateMemory returned VK_ERROR_OUT_OF_DEVICE_MEMORY"
    )
    monkeypatch.undo()
    assert device.memory().used == before, "what was allocated of it is given back"
    assert not device.lost
    run(device, arguments(2, 64, 96, 64))


def test_what_is_refused_before_anything_is_touched(device: Any) -> None:
    def refused(kind: str, schemes: tuple[str, ...], whole: bool = True, **constants: Any) -> str:
        return str(device.refuses(Work(Step(kind, "", "", "cpu", schemes, 0), constants, whole)))

    assert refused("linear", ("w8a",)) == refused("qkv", ("w8c",) * 3) == refused("ffn", ("w4g32",) * 3, bias=[]) == ""
    assert refused("linear", ("q6k",)) == "weights are q6k, the shaders take w8c and w8a"
    assert refused("ffn", ("w4g32", "w8c", "w4g32"), bias=[]) == "weights are w4g32, w8c, the shaders take w4g32"
    assert "row ranges" in refused("qkv", ("w8c",) * 3, whole=False) and "biases" in refused("ffn", ("w4g32",) * 3)
    assert "the CPU's cache" in refused("attention", ("w8c",)) and "experts" in refused("experts", ("w4g32",))


def test_heaps_are_summed(device: Any) -> None:
    import dataclasses

    plain = device._device.physical
    device._device.physical = dataclasses.replace(plain, features=dataclasses.replace(plain.features, budget=False))
    device._device._heaps = [3 << 30, 5 << 30]
    assert device.memory().budget == (8 << 30) - device._device.used
    device._device.physical = plain


def test_pipeline_cache(physical: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: Any) -> None:
    from unicorn_backend.runtime.vulkan import pipeline_cache

    monkeypatch.setenv("UNICORN_CACHE", "1")
    monkeypatch.setenv("UNICORN_CACHE_DIR", str(tmp_path))

    def use() -> torch.Tensor:
        runtime.close_devices()
        opened = runtime.open_device(NAME)
        assert not isinstance(opened, str), opened
        result = run(opened, arguments(2, 64, 96, 64))
        runtime.close_devices()
        return result

    want = use()
    path = pipeline_cache.path_of(physical.cache_key)
    assert path is not None and path.stat().st_size > 80 and path.parent.stat().st_mode & 0o077 == 0
    data = path.read_bytes()
    assert torch.equal(use(), want)
    for damaged in (data[:-10], data[:60] + bytes(10) + data[70:], b"", b"not a cache"):
        path.write_bytes(damaged)
        caplog.clear()
        assert torch.equal(use(), want)
        assert ("damaged" in caplog.text) == bool(damaged)
    assert pipeline_cache.read(physical.cache_key), "written anew"
    monkeypatch.setenv("UNICORN_CACHE_DIR", "/proc/nowhere")
    assert torch.equal(use(), want)


def test_thousand_models_and_ten_thousand_tokens_leak_nothing(device: Any) -> None:
    first = arguments(1, 64, 96, 64)
    run(device, first)
    fresh = [arguments(1, 64, 96, 64) for _ in range(4)]

    def cycle(i: int) -> None:
        weights = [[t.clone() for t in w] for w in first[4:7]]
        run(device, (*fresh[i % 4][:4], *weights, *fresh[i % 4][7:]))

    for i in range(50):
        cycle(i)
    gc.collect()
    before, resident = device.memory(), resident_mb()
    for i in range(1000):
        cycle(i)
    assert (device.memory().used, len(device._regions)) == (before.used, 1)
    assert resident_mb() - resident < 16, "1,000 loads and unloads"
    resident = resident_mb()
    region = device.region("int4_ffn", first)
    for _ in range(10_000):
        region.run(first)
    assert device.memory().used == before.used
    assert resident_mb() - resident < 4, "10,000 tokens"


def test_models_that_come_and_go_leave_nothing_on_the_device(device: Any) -> None:
    first, *others = cycles(device, 2)  # a thousand by hand: see there
    assert first.regions == first.shared == 0
    for left in others:
        assert (left.used, left.shared, left.regions, left.tokens) == (first.used, 0, 0, first.tokens)


def test_a_call_under_way(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may come in between, its weights may go, the device may be lost or closed: the result is right or none."""
    from unicorn_backend.runtime.vulkan.api import VulkanError
    from unicorn_backend.runtime.vulkan.logical import LogicalDevice

    args = (*arguments(3, 64, 96, 64)[:-1], None)  # without a residual
    want = run(device, args).float()

    def start(given: tuple[Any, ...]) -> Any:
        begun = device.region("int4_ffn", given).start(given)
        assert not isinstance(begun, str), begun
        return begun

    begun = start(args)
    run(device, arguments(9, 64, 96, 64, "silu"))
    result = begun.result()
    assert result.dtype == torch.float32 and torch.equal(result.bfloat16().float(), want)
    assert begun.result() is result

    weights = [[t.clone() for t in w] for w in args[4:7]]
    begun, regions = start((*args[:4], *weights, *args[7:])), len(device._regions)
    del weights
    gc.collect()
    assert len(device._regions) == regions, "they stay as long as the call"
    assert torch.equal(begun.result().bfloat16().float(), want)
    del begun
    gc.collect()
    assert len(device._regions) == regions - 1

    begun = start(args)
    lost = VulkanError("vkWaitForFences", -4)
    monkeypatch.setattr(LogicalDevice, "wait", lambda self, spin=False: (_ for _ in ()).throw(lost))
    assert "the device is lost (vkWaitForFences" in begun.result()
    monkeypatch.undo()
    assert "lost" in device.region("int4_ffn", args)
    device.lost = ""
    device._device.wait()  # it was not: what was submitted is there
    begun = start(args)
    device.close()
    assert torch.equal(begun.result().bfloat16().float(), want)


def test_threads_take_turns(device: Any) -> None:
    cases = [arguments(m, 64, 96, 64, act) for m in (1, 9) for act in ("silu", "gelu_tanh")]
    want = [run(device, args) for args in cases]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            if not torch.equal(run(device, cases[i]), want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_forked_child_leaves_the_device_alone(device: Any) -> None:
    args = arguments(2, 64, 96, 64)
    run(device, args)
    child = os.fork()
    if child == 0:
        os._exit(0 if "forked" in str(device.region("int4_ffn", args)) else 1)
    assert os.waitpid(child, 0)[1] == 0
    run(device, args)


def test_without_the_package_or_a_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util
    import sys

    from unicorn_backend.runtime import vulkan

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'unicorn-backend[vulkan]'" in str(vulkan.open_device(""))
    monkeypatch.undo()

    class Broken:
        def find_spec(self, name: str, *rest: Any) -> None:
            if name == "unicorn_backend.runtime.vulkan.api":
                raise OSError("Cannot find Vulkan SDK version")

    monkeypatch.delitem(sys.modules, "unicorn_backend.runtime.vulkan.api", raising=False)
    monkeypatch.delattr(vulkan, "api", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert "apt install libvulkan1" in str(vulkan.open_device(""))


def test_a_calibration_measures_feed_forwards_and_predicts_from_them(
    device: Any, physical: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Small sizes on a software driver, which `unicorn calibrate` itself leaves out."""
    from unicorn_backend.runtime.vulkan import cost

    monkeypatch.setenv("UNICORN_CACHE", "1")
    monkeypatch.setenv("UNICORN_CACHE_DIR", str(tmp_path))
    guess = cost.rates(physical)
    assert guess.source == ESTIMATED
    measured = cost.calibrate(device, (1, 8, 16), 64, 128, 1 << 16)
    assert not isinstance(measured, str) and measured.submit_us > 0
    assert set(measured.weights) == set(cost.SCHEMES)
    assert all(set(table) == {1, 8, 16} for table in measured.weights.values())
    assert calibration.store("vulkan", cost.identity(physical), 1.0, measured) is not None
    assert cost.rates(physical) == measured
    step = Step("ffn", "", "", device.name, ("w4g32",) * 3, 0, weights=(1_000_000,) * 3)
    us, source = device.predict(Work(step, {}, True), 8, 0)
    assert us == pytest.approx(measured.submit_us + 3 * measured.weights["w4g32"][8]) and "measured" in source
    head = Step("linear", "", "", device.name, ("w8a",), 0, weights=(2_000_000,))
    us, _ = device.predict(Work(head, {}, True), 1, 0)
    assert us == pytest.approx(measured.submit_us + 2 * measured.weights["w8a"][1])
    if device.software:
        assert "never preferred" in calibration._calibrate_vulkan("vulkan:0", physical)
