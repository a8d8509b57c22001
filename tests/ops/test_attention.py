"""The attention core of every instruction set against the fp64 reference.

Tolerance, with u = 2^-24: a logit is a sum of D products, in any order, then scaled, so it is off by at most
(D + 2) u times scale * |q| . |k|; softcap has slope <= 1 and adds 8 u of itself; adding the mask adds u of the
result. A weight is e^logit, whose relative error is the error of logit and maximum, plus 4 u of exp. Numerator
and denominator are sums of S such weights in fp32: (S + 16) u more, twice with the merges of maxima. The output
is their quotient, a mean of v, so its error is below twice all this, times the largest |v|. The tests ask that
this bound is itself below 1 % of the largest |v|; typically the kernels stay below a tenth of it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.attention import ISAS, Core
from unicorn_backend import reference

U = 2.0**-24
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
QUERIES = (1, 2, 5, 17, 64)
KEYS = (131, 257, 67, 523, 7)  # prime: no multiple of a vector, a panel or a block
GROUPS = (1, 2, 4, 8)
WIDTHS = ((64, 64), (256, 256), (80, 80), (128, 128), (33, 17), (96, 40), (7, 130), (1, 1))
MASKS = (
    "none",
    "random bool",
    "window",
    "padding",
    "-inf",
    "finfo.min",
    "one head",
    "one query",
    "one key",
    "column-major",
)


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Core:
    return Core(tmp_path_factory.mktemp("attention"))


@pytest.fixture(params=ISAS)
def isa(core: Core, request: pytest.FixtureRequest) -> str:
    if not core.set_isa(request.param):
        pytest.skip(f"this CPU does not run {request.param}")
    return str(request.param)


def window(queries: int, keys: int, width: int) -> Tensor:
    behind = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
    return (behind >= 0) & (behind < width)


def make_mask(kind: str, b: int, h: int, t: int, s: int, dtype: torch.dtype) -> Tensor | None:
    allowed = window(t, s, 40) & (torch.rand(s) < 0.9)
    lowest = -torch.inf if kind == "-inf" or dtype == torch.float16 else torch.finfo(dtype).min
    added = torch.zeros(t, s, dtype=dtype).masked_fill(~allowed, lowest)
    masks = {
        "none": None,
        "random bool": torch.rand(b, h, t, s) < 0.5,
        "window": allowed,
        "padding": (torch.arange(s) >= s // 3).expand(b, 1, 1, s),
        "-inf": added,
        "finfo.min": added,
        "one head": torch.randn(b, 1, t, s, dtype=dtype),
        "one query": torch.randn(1, h, 1, s, dtype=dtype),
        "one key": torch.randn(b, 1, t, 1, dtype=dtype),
        "column-major": torch.randn(s, t, dtype=dtype).T,
    }
    return masks[kind]


def expected(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, softcap: float
) -> Tensor:
    """fp64 [B, T, H, Dv], by way of an identity projection; head by head, so that it stays small."""
    heads, n = q.shape[1], v.shape[3]
    identity = [torch.eye(n, dtype=torch.float64)]
    full = None if mask is None else mask.expand(*q.shape[:3], k.shape[2])
    out = []
    for h in range(heads):
        shared = h * k.shape[1] // heads
        part = (q[:, h : h + 1], k[:, shared : shared + 1], v[:, shared : shared + 1])
        only = None if full is None else full[:, h : h + 1]
        tail = (identity, None, n, None, None, 0.0, None)
        out.append(reference.int8_attention(*(x.double() for x in part), only, causal, scale, softcap, *tail))
    return torch.stack(out, 2)


def tolerance(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float) -> float:
    keys = k.abs().double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    size = float((q.abs().double() @ keys.transpose(-1, -2)).max()) * scale
    logit = (q.shape[3] + 2) * U * size + 8 * U * softcap
    if mask is not None and mask.dtype != torch.bool:
        finite = mask[mask > -1e30]
        logit += U * (size + (float(finite.abs().max()) if finite.numel() else 0.0))
    bound = 2 * (2 * logit + 4 * U + 2 * (k.shape[2] + 16) * U)
    assert bound < 0.01
    return bound * float(v.abs().max())


def check(
    core: Core, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, softcap: float
) -> None:
    """Every instruction set that this CPU has, with one and with two threads."""
    want, bound = expected(q, k, v, mask, causal, scale, softcap), tolerance(q, k, v, mask, scale, softcap)
    for name in filter(core.set_isa, ISAS):
        one, two = (core.prepare(q, k, v, mask, causal, scale, softcap, threads=n)() for n in (1, 2))
        assert float((one - want).abs().max()) <= bound, name
        assert torch.equal(one, two), f"{name}: the result depends on the number of threads"


def heads_last(b: int, h: int, s: int, d: int, dtype: torch.dtype) -> Tensor:
    """[B, H, S, D] as a projection leaves it, and inside a longer cache."""
    return torch.randn(b, s + 3, h, d + 2, dtype=dtype)[:, 2:-1, :, 1:-1].transpose(1, 2)


def cases() -> Iterator[tuple[Any, ...]]:
    """Every number of queries with every mask and type; all else by lot, the same in each run."""
    lot = random.Random(0)
    for t, mask, dtype in itertools.product(QUERIES, MASKS, DTYPES):
        d, dv = lot.choice(WIDTHS)
        yield (
            t,
            mask,
            dtype,
            lot.choice(GROUPS),
            d,
            dv,
            lot.choice(KEYS),
            lot.random() < 0.6,
            lot.choice((0.0, 0.0, 0.0, 30.0)),
        )


def test_grid(core: Core) -> None:
    for t, kind, dtype, group, d, dv, s, causal, softcap in cases():
        q, k, v = (heads_last(2, h, n, w, dtype) for h, n, w in ((2 * group, t, d), (2, s, d), (2, s, dv)))
        mask = make_mask(kind, 2, 2 * group, t, s, DTYPES[(t + s) % 3])
        check(core, q, k, v, mask, causal, d**-0.5, softcap)


@pytest.mark.parametrize("width", (64, 80, 96, 128, 256, 320))
@pytest.mark.parametrize("t", (1, 70))
def test_head_widths(core: Core, width: int, t: int) -> None:
    q, k, v = (torch.randn(1, h, n, width, dtype=torch.bfloat16) for h, n in ((4, t), (1, 263), (1, 263)))
    check(core, q, k, v, None, True, width**-0.5, 0.0)


@pytest.mark.parametrize("t", (1, 40))
def test_large_logits(core: Core, t: int) -> None:
    """Weights that are 0 or 1 almost everywhere, and a maximum that moves through the blocks."""
    q, k, v = (torch.randn(1, 2, n, 64) for n in (t, 521, 521))
    k *= torch.linspace(0.1, 4, 521)[:, None]
    check(core, q, k, v, None, False, 1.0, 0.0)
    check(core, q, k.flip(2), v.flip(2), None, False, 1.0, 0.0)


@pytest.mark.parametrize("t", (1, 40))
@pytest.mark.parametrize("lowest", (None, -torch.inf, torch.finfo(torch.float32).min))
def test_rows_without_keys(core: Core, isa: str, t: int, lowest: float | None) -> None:
    """-inf and False leave zeros. finfo.min is a number: a row of nothing else is the mean of v."""
    q, k, v = (torch.randn(1, 4, n, 64) for n in (t, 300, 300))
    allowed = torch.ones(4, t, 300, dtype=torch.bool)
    allowed[1] = False
    mask = allowed if lowest is None else torch.zeros(4, t, 300).masked_fill(~allowed, lowest)
    out = core.prepare(q, k, v, mask, scale=0.125)()
    assert float((out - expected(q, k, v, mask, False, 0.125, 0.0)).abs().max()) <= tolerance(q, k, v, mask, 0.125, 0.0)
    mean = v[:, 1].mean(1).expand(t, 64)
    torch.testing.assert_close(out[0, :, 1], mean if lowest and lowest > -torch.inf else torch.zeros(t, 64))


def test_more_queries_than_keys(core: Core) -> None:
    """Under the causal flag the first T - S queries see nothing."""
    for t, s in ((8, 3), (100, 67), (130, 129)):
        q, k, v = (torch.randn(1, 2, n, 64) for n in (t, s, s))
        check(core, q, k, v, None, True, 0.125, 0.0)
        assert core.prepare(q, k, v, causal=True)()[:, : t - s].eq(0).all()


@pytest.mark.parametrize("t", (1, 200))
def test_any_number_of_threads(core: Core, isa: str, t: int) -> None:
    """Tasks of other sizes on other threads, and the same bits."""
    q, k, v = (torch.randn(1, h, n, 64, dtype=torch.bfloat16) for h, n in ((4, t), (1, 700), (1, 700)))
    first, *others = (core.prepare(q, k, v, causal=True, scale=0.125, threads=n)() for n in (1, 3, 8))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("t", (1, 3))
def test_padding_on_the_left_changes_no_bit(core: Core, isa: str, t: int) -> None:
    """Sequences of a batch are what each is alone, though the longest is cut into other blocks of keys."""
    lengths, longest = (3, 70, 300, 2048, 2300), 2300
    q, k, v = (torch.randn(len(lengths), h, n, 64) for h, n in ((4, t), (2, longest), (2, longest)))
    row = torch.arange(longest)
    mask = torch.stack([(row >= longest - n) & window(t, longest, longest) for n in lengths])[:, None]
    together = core.prepare(q, k, v, mask, scale=0.125)().clone()
    for i, n in enumerate(lengths):
        own = (x[i : i + 1, :, longest - n :] for x in (k, v))
        alone = core.prepare(q[i : i + 1], *own, causal=True, scale=0.125)()
        assert torch.equal(together[i], alone[0]), n


@pytest.mark.parametrize("group", (1, 2, 4))
@pytest.mark.parametrize("keys", (300, 2050), ids=str)  # from 2049 keys on blocks are longer
@pytest.mark.parametrize("width", (100, 5000))  # of the sliding window
def test_several_tokens_get_the_bits_of_one_after_another(
    core: Core, isa: str, group: int, keys: int, width: int
) -> None:
    """What speculative decoding relies on."""
    t = 8 // group + 1 if group > 1 else 8
    dtype = torch.bfloat16 if group == 2 else torch.float32
    q, k, v = (torch.randn(1, h, n, 192).to(dtype) for h, n in ((2 * group, t), (2, keys), (2, keys)))
    together = core.prepare(q, k, v, window(t, keys, width), scale=0.125)().clone()
    for i in range(t):
        end = keys - t + i + 1
        seen = slice(max(end - width, 0), end)
        alone = core.prepare(q[:, :, i : i + 1], k[:, :, seen], v[:, :, seen], causal=True, scale=0.125)()
        assert torch.equal(together[:, i], alone[:, 0]), i


@pytest.mark.parametrize("t", (1, 40))
def test_what_is_masked_does_not_leak(core: Core, isa: str, t: int) -> None:
    """Keys outside a sliding window are not read into the result, whatever a cache holds there."""
    q, k, v = (torch.randn(1, 2, n, 64) for n in (t, 700, 700))
    mask = window(t, 700, 30)
    good = core.prepare(q, k, v, mask, scale=0.125)().clone()
    k[:, :, :600] = torch.nan
    v[:, :, :600] = torch.inf
    assert torch.equal(core.prepare(q, k, v, mask, scale=0.125)(), good)


@pytest.mark.parametrize("t", (1, 40))
def test_nan_is_not_hidden(core: Core, isa: str, t: int) -> None:
    q, k, v = (torch.randn(1, 2, n, 64) for n in (t, 300, 300))
    k[0, 1, 200, 3] = torch.nan
    out = core.prepare(q, k, v, scale=0.125)()
    assert out[:, :, 1].isnan().all() and out[:, :, 0].isfinite().all()
