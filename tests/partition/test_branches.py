"""Calls of a device that begin early and end late where the CPU has something else to do meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import unicorn_backend
from tests.runtime import drivers
from tests.test_architectures import BASE, LAYERS, build
from unicorn_backend import runtime, timing
from unicorn_backend.plan import Plan, Step
from unicorn_backend.runtime.device import Work
from unicorn_backend.runtime.null import NullDevice

NEW = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
IDS = torch.randint(3, 500, (1, 11), generator=torch.Generator().manual_seed(1))


class Ffns(NullDevice):
    """Takes feed-forwards alone, and loses itself after `left` calls."""

    left = 1 << 30

    def refuses(self, work: Work) -> str:
        return "" if work.step.kind == "ffn" else "not a feed-forward"

    def region(self, op: str, arguments: Any) -> Any:
        self.left -= 1
        self.lost = "" if self.left >= 0 else "it is gone"
        return super().region(op, arguments)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ffns]:
    runtime.close_devices()
    found = Ffns("")
    monkeypatch.setitem(runtime._opened, "null", found)
    yield found
    runtime.close_devices()


def moe() -> Any:
    """Routed experts and a shared one."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    values = {k: v for k, v in BASE.items() if k != "head_dim"}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    torch.manual_seed(0)
    config = Qwen2MoeConfig(**values, **experts, shared_expert_intermediate_size=64, decoder_sparse_step=1)
    model: Any = Qwen2MoeForCausalLM(config).to(torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    return model


def tokens(model: Any, **options: Any) -> list[int]:
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="unicorn", options=options)
    return [int(t) for t in compiled.generate(IDS, attention_mask=torch.ones_like(IDS), **NEW)[0]]


def reasons(model: Any) -> set[str]:
    return {s.reason for plan in unicorn_backend.explain(model).plans[-2:] for s in plan.steps if s.kind == "ffn"}


@pytest.mark.parametrize(("make", "beside"), [(lambda: build("Cohere"), "attention, qkv"), (moe, "experts")])
def test_what_the_cpu_does_meanwhile(device: Ffns, make: Any, beside: str) -> None:
    model = make()
    want = tokens(model)
    assert tokens(model, devices=["cpu", "null"], policy="fixed") == want, "the same bits: one rounding at the end"
    ran = [call[0] for call in device.calls if call[0] in ("start", "run")]
    assert ran == ["start", "run"] * LAYERS * NEW["max_new_tokens"]
    assert reasons(model) == {f"{device.label}; beside {beside}"}
    if beside == "experts":
        return  # generated Python, which is not timed
    with unicorn_backend.timed(model):
        compiled: Any = torch.compile(model, backend="unicorn", options={"devices": ["cpu", "null"], "policy": "fixed"})
        compiled.generate(IDS, attention_mask=torch.ones_like(IDS), **NEW)
    plan = unicorn_backend.explain(model).plans[-1]
    assert {m.step for m in plan.measured} == set(range(len(plan.steps)))


def test_times_are_given_to_the_steps_whose_results_they_are() -> None:
    steps = [Step(kind, "", f"unicorn::{op}", "cpu", (), 0) for kind, op in (("ffn", "int4_ffn"), ("linear", "linear"))]
    plan = Plan(1, "1", steps, order=[1, 0])
    timing.assign([plan], [timing.Event("unicorn::linear", 1, 0, 5.0), timing.Event("unicorn::int4_ffn", 1, 0, 7.0)])
    assert {m.step: m.us for m in plan.measured} == {0: 7.0, 1: 5.0}


def test_a_decoder_without_parallel_branches_has_nothing_to_overlap(device: Ffns) -> None:
    model = build("Llama")
    tokens(model, devices=["cpu", "null"], policy="fixed")
    assert reasons(model) == {device.label} and ("start", "int4_ffn") not in device.calls


def test_a_device_that_is_lost_between(device: Ffns) -> None:
    model = build("Cohere")
    want = tokens(model)
    device.left = LAYERS * 2 + 1
    assert tokens(model, devices=["cpu", "null"], policy="fixed") == want
    assert "null: it is gone" in reasons(model)


def test_on_vulkan() -> None:
    drivers.physical("llvmpipe")
    runtime.close_devices()
    model = build("Cohere")
    want = tokens(model)
    assert tokens(model, devices=["cpu", "vulkan:llvmpipe"], policy="fixed") == want
    (reason,) = reasons(model)
    assert reason.endswith("; beside attention"), "q/k/v run on the same device, before it"
    runtime.close_devices()
