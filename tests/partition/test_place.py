"""Placement: which region runs where and why, what the plan shows, and that the compile cache keeps no device."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import unicorn_backend
from tests.test_compile_cache import make  # the embedded model cut to two layers
from unicorn_backend import runtime
from unicorn_backend.errors import OptionError
from unicorn_backend.integration import compile_cache
from unicorn_backend.partition import cost
from unicorn_backend.partition.place import Offer, offer
from unicorn_backend.plan import Plan, Step
from unicorn_backend.quantize.schemes import quantize_weight
from unicorn_backend.runtime import placed
from unicorn_backend.runtime.device import Memory, Work
from unicorn_backend.runtime.null import NullDevice

NEW = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
LAYERS = 2
REGIONS = 3 * LAYERS + 1  # attention, qkv and feed-forward of each, and the head


X = torch.randn(3, 64)


class Gated(nn.Module):
    """One feed-forward; `fused`: gate and up in one projection, as in Phi-3."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.gate_up = nn.ModuleList(nn.Linear(64, 256 if fused else 128, bias=False) for _ in range(2 - fused))
        self.down = nn.Linear(128, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up[0](x).chunk(2, -1) if len(self.gate_up) == 1 else [p(x) for p in self.gate_up]
        y: torch.Tensor = self.down(nn.functional.silu(gate) * up)
        return y


@pytest.fixture
def model() -> Any:
    return make()


@pytest.fixture(scope="module")
def want(sample_ids: torch.Tensor) -> list[int]:
    """What the CPU alone generates."""
    return tokens(make(), sample_ids[:, :9])


@pytest.fixture
def null() -> Iterator[NullDevice]:
    """The null device that the next compile will open."""
    runtime.close_devices()
    device = runtime.open_device("null")
    assert isinstance(device, NullDevice)
    yield device
    runtime.close_devices()


def tokens(model: Any, ids: torch.Tensor, **options: Any) -> list[int]:
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="unicorn", options=options)
    return [int(t) for t in compiled.generate(ids, attention_mask=torch.ones_like(ids), **NEW)[0]]


def placement(model: Any) -> set[tuple[str, str, str]]:
    return {(s.kind, s.device, s.reason) for plan in unicorn_backend.explain(model).plans for s in plan.steps}


def test_every_region_runs_where_it_is_placed_and_the_cache_keeps_no_device(
    model: Any,
    want: list[int],
    sample_ids: torch.Tensor,
    null: NullDevice,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Any,
) -> None:
    monkeypatch.setenv("UNICORN_CACHE", "1")
    monkeypatch.setenv("UNICORN_CACHE_DIR", str(tmp_path))
    dumped: list[Any] = []
    plain = compile_cache.graph_file.dump
    monkeypatch.setattr(compile_cache.graph_file, "dump", lambda gm: dumped.append(plain(gm)) or dumped[-1])
    assert tokens(model, sample_ids[:, :9], devices=["cpu", "null"]) == want
    targets = {target[2] for data in dumped for op, _, target, *_ in data["nodes"] if op == "call_function"}
    assert len(dumped) == 2 and "int4_ffn" in targets and not any(t.startswith("placed") for t in targets)

    assert {kind: device for kind, device, _ in placement(model)} == {
        **dict.fromkeys(("qkv", "attention", "ffn", "linear"), "null"),
        **dict.fromkeys(("embedding", "norm"), "cpu"),
    }
    assert ("ffn", "null", null.label) in placement(model)
    forwards = NEW["max_new_tokens"]  # a prefill and the decode steps after it
    ran = [call[1] for call in null.calls if call[0] == "run"]
    assert {op: ran.count(op) for op in set(ran)} == {
        "int8_qkv": LAYERS * forwards,
        "int8_attention": LAYERS * forwards,
        "int4_ffn": LAYERS * forwards,
        "linear": forwards,
    }
    text = str(unicorn_backend.explain(model))
    assert f"{REGIONS} of them on null" in text and f"ffn x{LAYERS} on null: {null.label}" in text

    assert len(placed._sites) == 2 * REGIONS
    torch._dynamo.reset()
    gc.collect()
    assert len(placed._sites) == 0, "sites go with their graphs"


def test_what_is_refused_stays_on_the_cpu_and_what_is_lost_goes_back_with_the_right_tokens(
    model: Any,
    want: list[int],
    sample_ids: torch.Tensor,
    null: NullDevice,
    monkeypatch: pytest.MonkeyPatch,
    caplog: Any,
) -> None:
    seen: list[Work] = []
    plain = null.region

    def refuses(work: Work) -> str:
        seen.append(work)
        return "" if work.step.kind == "ffn" else f"it takes no {work.step.kind}"

    def region(op: str, arguments: Any) -> Any:
        if len(null.calls) > 5:
            null.lost = "the device is lost"
        return plain(op, arguments)

    monkeypatch.setattr(null, "refuses", refuses)
    monkeypatch.setattr(null, "region", region)
    assert tokens(model, sample_ids[:, :9], devices="null") == want
    assert [call for call in null.calls if call[0] == "run"] == [("run", "int4_ffn")] * 6
    shown = placement(model)
    assert ("qkv", "cpu", "null: it takes no qkv") in shown
    assert ("ffn", "cpu", "null: the device is lost") in shown
    assert "on the cpu: null: it takes no linear" in caplog.text
    assert "ffn at model.layers.0.mlp goes back to the cpu: null: the device is lost" in caplog.text
    ffn = next(work for work in seen if work.step.kind == "ffn")
    assert ffn.whole and ffn.constants["act"] == "gelu_tanh" and ffn.constants["f"] == 1024
    assert ffn.constants["bias"] == [] and "x" not in ffn.constants and "wg" not in ffn.constants


def test_a_device_without_a_runtime_is_a_reason_not_an_error(
    monkeypatch: pytest.MonkeyPatch, caplog: Any, null: NullDevice
) -> None:
    monkeypatch.setattr(runtime, "_open", lambda kind, selector: f"no {kind} here")
    module = Gated().eval()
    with torch.no_grad():
        torch.compile(module, backend="unicorn", options={"recipe": "default", "devices": ["cpu", "npu"]})(X)
    assert placement(module) == {("ffn", "cpu", "npu: no npu here")}
    assert "on the cpu: npu: no npu here" in caplog.text
    assert "ffn x1 on cpu: npu: no npu here" in str(unicorn_backend.explain(module))


def test_a_row_range_of_a_packed_weight_is_seen(null: NullDevice) -> None:
    module = Gated(fused=True).eval()
    with torch.no_grad():
        torch.compile(module, backend="unicorn", options={"recipe": "default", "devices": ["null"]})(X)
    ((kind, device, reason),) = placement(module)
    assert (kind, device) == ("ffn", "cpu") and "row ranges" in reason


@pytest.mark.parametrize("devices", ["gpu", ["vulkann:0"], [3]])
def test_devices_that_do_not_exist(devices: Any) -> None:
    with pytest.raises(OptionError, match=r"'devices': got .*allowed are cpu, vulkan, npu"):
        torch.compile(nn.Linear(2, 2), backend="unicorn", options={"devices": devices})


class Costed(NullDevice):
    """A device with a cost: a launch, and `rate` us per million weights and token."""

    def __init__(self, launch: float, rate: float, budget: int = 0) -> None:
        super().__init__("")
        self.launch, self.rate, self.budget = launch, rate, budget

    def predict(self, work: Work, tokens: int, keys: int) -> tuple[float, str]:
        return self.launch + self.rate * tokens * sum(work.step.weights) / 1e6, "by hand"

    def memory(self) -> Memory:
        return Memory(0, 0, self.budget)


FFN = Step("ffn", "layer", "unicorn::int4_ffn", "cpu", ("w4g32",) * 3, 9 << 20, weights=(8 << 20,) * 3, width=9000)
PROMPT, DECODE = Plan(1, "dynamic"), Plan(2, "1")


def offered(device: NullDevice, plan: Plan, policy: str = "speed", meanwhile: tuple[Step, ...] = ()) -> Offer:
    work = Work(FFN, {"bias": []}, True)
    return offer("null", device, work, plan, policy, cost.estimate(8, "avx512vnni"), {"null": 1e12}, meanwhile)


def test_speed_and_power_go_by_predicted_time_and_fixed_does_not() -> None:
    """A device that starts slowly and computes twice as fast as the CPU: prompts, but not one token."""
    device = Costed(launch=2000.0, rate=0.35)
    prompt, decode = offered(device, PROMPT), offered(device, DECODE)
    assert prompt.device is device and prompt.least > 64 and f"from {prompt.least} tokens on" in prompt.reason
    assert decode.device is None and "loses 1." in decode.reason and "ms: 2.01 ms, cpu" in decode.reason
    assert "by hand" in decode.reason and "estimated" in decode.reason
    power = offered(device, PROMPT, "power")
    assert power.device is device and power.least < prompt.least
    assert all(offered(device, plan, "fixed").device is device for plan in (PROMPT, DECODE))
    assert offered(Costed(100.0, 10.0), PROMPT, "power").device is None
    device.software = True
    assert "policy='fixed'" in offered(device, PROMPT).reason and offered(device, PROMPT, "fixed").device is device


def test_what_the_cpu_does_meanwhile_hides_a_prompts_time_on_a_device() -> None:
    """A device slower than the CPU gets a prompt's feed-forward where the CPU has as much else to do."""
    device = Costed(launch=2000.0, rate=0.9)
    assert offered(device, PROMPT).device is None
    other = dataclasses.replace(FFN, kind="linear", op="unicorn::linear")
    beside = offered(device, PROMPT, meanwhile=(other,))
    assert beside.device is device and beside.least > cost.FEW and "run beside the CPU's work" in beside.reason
    assert offered(device, DECODE, meanwhile=(other,)).device is None, "both read the same memory"
    assert offered(Costed(2000.0, 1.5), PROMPT, meanwhile=(other,)).device is None, (
        "0.7 of it is hidden, the rest is not"
    )


def test_layers_fill_a_device_in_order_and_the_rest_stays_on_the_cpu(
    model: Any, sample_ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Costed(0.0, 0.0, budget=450_000)  # one feed-forward has 442 kB
    monkeypatch.setattr(device, "refuses", lambda work: "" if work.step.kind == "ffn" else "no")
    monkeypatch.setattr("unicorn_backend.partition.place.open_device", lambda name: device)
    tokens(model, sample_ids[:, :9], devices="null")
    for plan in unicorn_backend.explain(model).plans:
        first, second = (step for step in plan.steps if step.kind == "ffn")
        assert first.device == "null" and second.device == "cpu"
        assert "null: its memory is full: 442.4 kB needed, 7.6 kB left" in second.reason
        assert {name for name, us in first.predicted_us} >= {"cpu"}
    assert [call for call in device.calls if call[0] == "run"] == [("run", "int4_ffn")] * NEW["max_new_tokens"]


def test_a_site_leaves_short_calls_to_the_cpu(null: NullDevice) -> None:
    site = placed.Site("linear", null, Plan(1, "dynamic", [FFN]), 0, least=4)
    w = quantize_weight(torch.randn(16, 32), "w8c")
    for count, runs in ((3, 0), (4, 1)):
        assert site((torch.randn(count, 32), w, None, 16)).shape == (count, 16)
        assert null.calls.count(("run", "linear")) == runs
    assert placed.tokens_of("int8_attention", (2, 4, 8, 64)) == 16 and placed.tokens_of("int4_ffn", (2, 8, 64)) == 16


@pytest.mark.parametrize("ffn", ["no", ""])
def test_an_attention_in_chunks_runs_beside_the_feed_forward(
    model: Any, want: list[int], sample_ids: torch.Tensor, null: NullDevice, monkeypatch: pytest.MonkeyPatch, ffn: str
) -> None:
    """Beside the CPU's only: on one device the two would wait for each other."""
    null.chunk = 4
    monkeypatch.setattr(null, "refuses", lambda work: ffn if work.step.kind == "ffn" else "")
    assert tokens(model, sample_ids[:, :9], devices="null") == want
    reasons = {reason for kind, _, reason in placement(model) if kind == "attention"}
    assert all(("from 8 tokens on in chunks" in reason) == bool(ffn) for reason in reasons)
    runs = [call for call in null.calls if call == ("run", "int8_attention")]
    assert len(runs) == LAYERS * NEW["max_new_tokens"]
