"""Attention in chunks beside the feed-forward: the same bits, and nothing lost when the device is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import unicorn_backend
from tests.npu.test_generate import PROMPT, device, generate, make_short, shortened
from tests.npu.test_regions import attention_args, masks
from tests.ops.test_regions import ffn_args
from unicorn_backend.assets import load_native
from unicorn_backend.runtime import close_devices, overlap
from unicorn_backend.runtime.npu import emulator
from unicorn_backend.runtime.npu.engine import NumpyEngine
from unicorn_backend.runtime.npu.regions import AttentionRegion

__all__ = ["make_short"]  # a fixture


pytestmark = pytest.mark.usefixtures("clean", "emulate")


@pytest.mark.parametrize("kind", masks(1, 1))
@pytest.mark.parametrize("count", [2, 3, 7])
def test_parts_are_the_whole(kind: str, count: int) -> None:
    """Quantized once: the bits do not depend on the chunks, whatever a chunk sees."""
    mask, causal = masks(70, 600)[kind]
    args = attention_args(70, 600, (4, 2, 64), mask, causal, post=True, b=2 if mask is None else 1)
    region = AttentionRegion(NumpyEngine(), "npu1", args)
    parts, whole = region.parts(args, count), region.run(args)
    assert not isinstance(parts, str) and not isinstance(whole, str)
    found = list(parts)
    assert [tokens.stop for tokens, _ in found[:-1]] == [tokens.start for tokens, _ in found[1:]]
    assert len(found) == count and torch.equal(torch.cat([part for _, part in found], 1), whole)


@pytest.mark.parametrize("scheme", ["w4g32", "w4n32", "q4k", "w8c"])
def test_a_feed_forward_of_some_rows_gives_their_bits(scheme: str) -> None:
    """Of the CPU: the number of rows of a call chooses the kernel, not the result."""
    load_native()
    args = ffn_args(150, 256, 512, 256, (scheme,) * 3, torch.bfloat16, pre=True, post=True)
    x = args[0].unsqueeze(0)
    whole = torch.ops.unicorn.int4_ffn(x, *args[1:-1], x)
    for count in (2, 7, 60, 150):
        rows = [x[:, tokens] for tokens in overlap.ranges(150, count)]
        parts = [torch.ops.unicorn.int4_ffn(part, *args[1:-1], part) for part in rows]
        assert torch.equal(torch.cat(parts, 1), whole)


def test_generate_in_chunks_gives_the_same_logits(
    make_tiny: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three chunks of every layer, each asked of the device by another thread than the feed-forward's."""
    want, compiled = generate(shortened(make_tiny(), 2))
    assert "in chunks beside the feed-forward" in str(unicorn_backend.explain(compiled))
    torch._dynamo.reset()
    close_devices()
    npu, started = device(), []
    npu.chunk = PROMPT // 3
    plain = overlap._next

    def noted(*arguments: Any) -> Any:
        part = plain(*arguments)
        started.append((threading.current_thread().name, part[0] if part else None))
        return part

    monkeypatch.setattr(overlap, "_next", noted)
    got, compiled = generate(shortened(make_tiny(), 2))
    assert torch.equal(got, want)
    chunks = [slice(0, 13), slice(13, 26), slice(26, 40), None]
    assert [tokens for _, tokens in started] == chunks * 2
    assert all(name.startswith("unicorn-overlap") for name, _ in started)
    started.clear()
    with unicorn_backend.timed(compiled), torch.inference_mode():
        compiled(torch.arange(PROMPT)[None] + 5)
    assert not started, "timed regions run alone"


def test_a_device_lost_between_chunks_ends_on_the_cpu(
    make_short: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole attention is computed again: the same logits as if the device had been lost before its first chunk."""
    found = []
    # Self-tests have 12 launches, the projection before attention one; a chunk has two K/V heads and its projection.
    for chunk, after in ((0, 13), (PROMPT // 3, 13 + 3 + 1)):
        npu = device()
        npu.chunk, npu.engine.timeout_ms = chunk, 500  # type: ignore[attr-defined]
        monkeypatch.setattr(emulator, "faults", emulator.Faults(hang=True, after=after))
        logits, compiled = generate(make_short())
        (step,) = (s for s in unicorn_backend.explain(compiled).plans[0].steps if s.kind == "attention")
        assert step.device == "cpu" and "no answer in 0.5 s" in step.reason
        assert emulator.faults.after == 0, "it was lost too late"
        found.append(logits)
        torch._dynamo.reset()
        close_devices()
    assert torch.equal(*found)
