"""Regions on the engine: spans of masks, quantization, whole ops against the reference, emulator against NumPy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ops.support import make_weight
from tests.ops.test_regions import qkv_args
from unicorn_backend import reference
from unicorn_backend.assets import load_native
from unicorn_backend.runtime.npu import emulator, regions
from unicorn_backend.runtime.npu.arithmetic import MASKED, State
from unicorn_backend.runtime.npu.engine import BUDGET_BYTES, Engine, NpuEngine, NumpyEngine, merge
from unicorn_backend.runtime.npu.regions import AttentionRegion, QkvRegion, key_spans
from unicorn_backend.runtime.npu.xrt import PyXrt


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("npu")


@pytest.fixture
def emulated(root: Path, monkeypatch: pytest.MonkeyPatch) -> NpuEngine:
    monkeypatch.setattr(emulator, "generation", "npu2")
    return NpuEngine(PyXrt(emulator, "the emulator"), root, True, BUDGET_BYTES, 600_000, builds=True)


def masks(t: int, s: int) -> dict[str, tuple[Tensor | None, bool]]:
    behind = torch.arange(t)[:, None] + s - t - torch.arange(s)
    window = (behind >= 0) & (behind < 40)
    padded = (behind >= 0) & (torch.arange(s) >= 9)
    added = torch.zeros(t, s).masked_fill(~window, torch.finfo(torch.float32).min)
    return {
        "causal": (None, True),
        "window": (window[None, None], False),
        "padding": (padded[None, None], False),
        "added": (added[None, None], False),
        "two dimensions": (window, False),
        "both": (window[None, None], True),
    }


def attention_args(
    t: int, s: int, heads: tuple[int, int, int], mask: Tensor | None, causal: bool, **on: Any
) -> list[Any]:
    h, hkv, d = heads
    b, n = on.get("b", 1), 96
    q, k, v = (torch.randn(b, x, y, d) * on.get("spread", 1.0) for x, y in ((h, t), (hkv, s), (hkv, s)))
    k = k + on.get("outlier", 0.0) * torch.randn(d)  # the same channels in every key, as trained models have them
    post = (torch.rand(n), 1e-6, 1.0) if on.get("post") else (None, None, 0.0)
    residual = torch.randn(b, t, n).bfloat16() if on.get("post") else None
    args = [x.bfloat16() for x in (q, k, v)]
    return [*args, mask, causal, d**-0.5, 0.0, make_weight(n, h * d, "w8c"), None, n, *post, residual]


def distance(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("kind", masks(1, 1))
def test_spans_are_the_mask(kind: str) -> None:
    mask, causal = masks(70, 130)[kind]
    spans = key_spans(mask, causal, 2, 70, 130)
    assert spans is not None
    column = torch.arange(130)
    got = (column >= torch.from_numpy(spans)[..., :1]) & (column < torch.from_numpy(spans)[..., 1:])
    allowed = torch.ones(70, 130, dtype=torch.bool) if mask is None else mask.reshape(70, 130)
    allowed = allowed if allowed.dtype == torch.bool else allowed > -1e30
    want = allowed.tril(60) if causal else allowed
    assert (got == want).all()


def test_masks_that_are_no_spans() -> None:
    """Holes, something added, another mask per head, a row of nothing but finfo.min: the CPU's."""
    holes = torch.ones(1, 1, 4, 8, dtype=torch.bool)
    holes[..., 3] = False
    assert key_spans(holes, False, 1, 4, 8) is None
    assert key_spans(torch.full((1, 1, 4, 8), 0.5), False, 1, 4, 8) is None
    assert key_spans(torch.ones(1, 2, 4, 8, dtype=torch.bool), False, 1, 4, 8) is None
    assert key_spans(torch.full((1, 1, 4, 8), torch.finfo(torch.float32).min), False, 1, 4, 8) is None
    nothing = torch.zeros(1, 1, 4, 8, dtype=torch.bool)
    spans = key_spans(nothing, False, 1, 4, 8)
    assert spans is not None and (spans == 0).all()


@pytest.mark.parametrize("kind", masks(1, 1))
@pytest.mark.parametrize("heads", [(4, 2, 64), (4, 1, 256), (2, 2, 128)])
def test_attention_is_near_the_reference(kind: str, heads: tuple[int, int, int]) -> None:
    """Quantization error alone: below 2.5 % of the result for normal data."""
    mask, causal = masks(70, 130)[kind]
    args = attention_args(70, 130, heads, mask, causal, post=kind == "causal", b=2 if kind == "both" else 1)
    got = AttentionRegion(NumpyEngine(), "npu1", args).run(args)
    assert not isinstance(got, str) and got.dtype == torch.bfloat16
    assert distance(got, reference.int8_attention(*args)) < 0.025


def test_constant_channels_of_keys_cost_nothing() -> None:
    """The mean of the keys is taken off: outliers that all keys share do not widen the step."""
    args = attention_args(64, 64, (2, 1, 128), None, True, outlier=30.0)
    got = AttentionRegion(NumpyEngine(), "npu1", args).run(args)
    assert not isinstance(got, str) and distance(got, reference.int8_attention(*args)) < 0.03


def test_long_ranges_are_merged() -> None:
    """1,300 keys are three launches; a row at their end sees them all."""
    args = attention_args(20, 1300, (2, 1, 64), None, True)
    region = AttentionRegion(NumpyEngine(), "npu1", args)
    got = region.run(args)
    assert not isinstance(got, str) and distance(got, reference.int8_attention(*args)) < 0.025


def test_merge_is_the_whole() -> None:
    """States of three ranges of keys in exact arithmetic, one of them empty for some rows, give the state of all."""
    rng = np.random.default_rng(0)
    t, v = rng.normal(size=(9, 30)) * 900, rng.normal(size=(30, 4))
    t[:4, 20:] = MASKED

    def state(part: slice) -> State:
        m = np.maximum(t[:, part].max(1), MASKED)
        p = np.exp2((t[:, part] - m[:, None]) / 256) * (t[:, part] > MASKED)
        return State(m, p.sum(1), p @ v[part])

    merged = merge([state(slice(0, 7)), state(slice(7, 20)), state(slice(20, 30))])
    whole = state(slice(0, 30))
    assert np.allclose(merged.o / merged.l[:, None], whole.o / whole.l[:, None], rtol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_qkv_is_near_the_reference(bias: bool) -> None:
    args = qkv_args(2, 40, 256, (4, 2, 64), "w8c", torch.bfloat16, pre=True, norm=True, rotary=True, bias=bias)
    got = QkvRegion(NumpyEngine(), "npu2", args).run(args)
    assert not isinstance(got, str)
    for one, want in zip(got, reference.int8_qkv(*args), strict=True):
        assert one.is_contiguous() and one.shape == want.shape and one.dtype == want.dtype
        assert distance(one, want) < 0.02


def test_values_that_are_not_finite_go_to_the_cpu() -> None:
    args = qkv_args(1, 4, 64, (2, 1, 64), "w8c", torch.float32)
    engine: Engine = NumpyEngine()
    region = QkvRegion(engine, "npu1", args)
    assert not isinstance(region.run(args), str)
    args[0][0, 1, 3] = math.inf
    assert region.run(args) == regions.NOT_FINITE
    attention = attention_args(4, 4, (2, 1, 64), None, True)
    attention[1][0, 0, 2, 5] = math.nan
    assert AttentionRegion(engine, "npu1", attention).run(attention) == regions.NOT_FINITE


def test_large_logits_are_exact_enough_or_the_cpus() -> None:
    """Up to where int8 steps add 0.25 to them, some 5 % of the result; a negative scale is one, too."""
    served = 0
    for spread in (1e-18, 1e-3, 1.0, 2.0, 3.0, 3.7, 4.3, 6.0, 30.0, 1e3, 1e18):
        for change in (1.0, -1.0):
            args = attention_args(40, 150, (4, 2, 64), None, True, spread=spread)
            args[5] *= change
            got = AttentionRegion(NumpyEngine(), "npu1", args).run(args)
            if isinstance(got, str):
                assert "too coarse" in got and spread > 3
                continue
            served += 1
            assert spread < 5 and distance(got, reference.int8_attention(*args)) < 0.07
    assert served >= 10


def test_one_row_that_is_far_larger_is_the_cpus() -> None:
    for position in (0, 1):
        args = attention_args(40, 150, (4, 2, 64), None, True)
        args[position][0, 0, 3] *= 300
        assert "too coarse" in str(AttentionRegion(NumpyEngine(), "npu1", args).run(args))


def test_a_call_that_stays_on_the_cpu_is_said_once(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And the next one goes to the NPU again."""
    from unicorn_backend.runtime.npu.device import NpuDevice

    load_native()
    monkeypatch.setattr(emulator, "generation", "npu1")
    npu = NpuDevice(PyXrt(emulator, "the emulator"), root, True, NumpyEngine())
    monkeypatch.setattr("unicorn_backend.runtime.npu.device._said", set())
    args = attention_args(40, 150, (4, 2, 64), None, True, spread=100.0)
    region = npu.region("int8_attention", args)
    for _ in range(2):
        assert torch.equal(region.run(args), torch.ops.unicorn.int8_attention(*args))
        ((tokens, part),) = region.parts(args, 3)
        assert tokens == slice(0, 40) and torch.equal(part, region.run(args))
    (record,) = [r for r in caplog.records if r.levelname == "WARNING"]
    assert "a call of int8_attention runs on the cpu: int8 queries and keys would be too coarse" in record.getMessage()
    args[0] /= 100
    args[1] /= 100
    assert not torch.equal(region.run(args), torch.ops.unicorn.int8_attention(*args))


@pytest.mark.parametrize("kind", ["causal", "window", "padding"])
def test_emulator_gives_numpys_bits(emulated: NpuEngine, kind: str) -> None:
    """The same regions through launches, buffers and host-compiled kernels: equal, not near."""
    mask, causal = masks(150, 700)[kind]
    args = attention_args(150, 700, (4, 2, 64), mask, causal, post=True)
    want = AttentionRegion(NumpyEngine(), "npu2", args).run(args)
    got = AttentionRegion(emulated, "npu2", args).run(args)
    assert not isinstance(got, str) and not isinstance(want, str) and torch.equal(got, want)
    assert emulated.launches > 4
    qkv = qkv_args(1, 150, 256, (4, 2, 64), "w8c", torch.bfloat16, pre=True, norm=True, rotary=True)
    want_qkv = QkvRegion(NumpyEngine(), "npu2", qkv).run(qkv)
    got_qkv = QkvRegion(emulated, "npu2", qkv).run(qkv)
    assert not isinstance(got_qkv, str) and not isinstance(want_qkv, str)
    assert all(torch.equal(a, b) for a, b in zip(got_qkv, want_qkv, strict=True))


def test_gemma_3_1b_shapes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer of Gemma 3 1B on the first generation: hidden 1152, 4 heads of 256, window 512, 600 keys."""
    monkeypatch.setattr(emulator, "generation", "npu1")
    engine = NpuEngine(PyXrt(emulator, "the emulator"), root, True, BUDGET_BYTES, 600_000, builds=True)
    t = 64
    qkv = qkv_args(1, t, 1152, (4, 1, 256), "w8c", torch.bfloat16, pre=True, norm=True, rotary=True)
    got, want = (QkvRegion(e, "npu1", qkv).run(qkv) for e in (engine, NumpyEngine()))
    assert (
        not isinstance(got, str)
        and not isinstance(want, str)
        and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    )
    behind = torch.arange(t)[:, None] + 600 - t - torch.arange(600)
    args = attention_args(t, 600, (4, 1, 256), ((behind >= 0) & (behind < 512))[None, None], False)
    args[7], args[9] = make_weight(1152, 1024, "w8c"), 1152
    got_a, want_a = (AttentionRegion(e, "npu1", args).run(args) for e in (engine, NumpyEngine()))
    assert not isinstance(got_a, str) and not isinstance(want_a, str) and torch.equal(got_a, want_a)


def test_refusals() -> None:
    assert "w4g32" in regions.refusal("int8_qkv", {}, ["w8c", "w4g32", "w8c"])
    assert "softcap" in regions.refusal("int8_attention", {"softcap": 50.0}, ["w8c"])
    assert regions.refusal("int8_attention", {"softcap": 0.0}, ["w8c"]) == ""
