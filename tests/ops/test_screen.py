"""Screening a head's rows keeps every score that may be among the largest, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from unicorn_backend import layouts

CASES = [  # rows, columns, dtype of x; a last tile of 5 rows, and columns that fill no group
    (16 * 40 + 5, 256, torch.bfloat16),
    (16 * 40 + 5, 200, torch.float32),
    (16 * 300, 64, torch.float16),
]


def _head(n: int, k: int, *, zero_points: bool) -> list[Tensor]:
    q = (torch.randn(n, k) * 40 + 120).clamp(0, 255).to(torch.uint8)
    z = torch.randint(90, 160, (n,), dtype=torch.uint8) if zero_points else None
    return layouts.pack_w8(q, torch.rand(n) * 0.01 + 0.001, z)


def _bound(weights: list[Tensor], n: int) -> Any:
    """A graph of one linear, with its weight."""
    program = torch.classes.unicorn.Program(1 + len(weights))
    constants = [program.constant(value) for value in (None, n)]
    places = list(range(1, 1 + len(weights)))
    program.outputs([program.call("unicorn::linear", "", [-1, len(weights), -1, -1], [0, *places, *constants])])
    return program.bind(places, weights, [])


def _screened(weights: list[Tensor], n: int) -> tuple[Any, Any]:
    bound, screen = _bound(weights, n), torch.classes.unicorn.Screen(weights)
    bound.screen(screen)
    return bound, screen


def _check(scores: Tensor, full: Tensor, best: int) -> int:
    """How many rows were left out."""
    left = scores == -torch.inf
    assert torch.equal(scores[~left], full[~left])
    least = full.flatten().topk(min(best, full.numel())).values[-1]
    assert not bool((left & (full >= least)).any())
    return int(left.sum())


@pytest.mark.parametrize("zero_points", [True, False])
@pytest.mark.parametrize("n, k, dtype", CASES)
def test_the_best_rows_have_their_scores(isa: str, n: int, k: int, dtype: torch.dtype, zero_points: bool) -> None:
    torch.manual_seed(n + k)
    weights = _head(n, k, zero_points=zero_points)
    for best in (1, 3, 64):
        bound, screen = _screened(weights, n)
        left = 0
        with torch.no_grad():
            for _ in range(12):
                x = torch.randn(1, 1, k).to(dtype)
                left += _check(bound.run([x], best)[0], bound.run([x], 0)[0], best)
        read, calls = screen.read()
        assert calls == 12 and read <= calls * weights[0].nbytes * 1.3
        assert best > 1 or left > 900, "of some 10 of 41 tiles, or most of 300"


def test_wide_rows_start_with_six_bits(isa: str) -> None:
    """Bounds widen with the root of K: five bits leave most tiles of random rows, six few."""
    n, k = 16 * 200, 1536
    weights = _head(n, k, zero_points=True)
    bound, screen = _screened(weights, n)
    reads = []
    with torch.no_grad():
        for _ in range(12):
            x = torch.randn(1, k)
            before = screen.read()[0]
            _check(bound.run([x], 1)[0], bound.run([x], 0)[0], 1)
            reads.append((screen.read()[0] - before) / weights[0].nbytes)
    assert (reads[0] >= 0.625 and reads[0] < 0.75) or reads[1] < 0.75, "five bits"
    assert all(0.75 <= read for read in reads[-3:]), "six bits, or all"


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_threads(count: int) -> None:
    torch.set_num_threads(count)
    weights = _head(2000, 128, zero_points=True)
    bound, _ = _screened(weights, 2000)
    with torch.no_grad():
        for best in (1, 4, 200):
            x = torch.randn(1, 128)
            _check(bound.run([x], best)[0], bound.run([x], 0)[0], best)


def test_equal_scores_all_stay() -> None:
    """Rows that are the same, and scores that are the same once they are rounded."""
    n, k = 16 * 64, 64
    q = torch.full((n, k), 130, dtype=torch.uint8)
    q[7::100, :] = 200
    weights = layouts.pack_w8(q, torch.full((n,), 0.01))
    bound, _ = _screened(weights, n)
    x = torch.rand(1, k).bfloat16()
    with torch.no_grad():
        full, scores = bound.run([x], 0)[0], bound.run([x], 1)[0]
    assert torch.equal((scores == scores.max())[0].nonzero().flatten(), torch.arange(7, n, 100))
    assert _check(scores, full, 1) == n - 16 * 11, "the tiles of these rows"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38, 1e14, 1e-38, 0.0])
def test_activations_of_any_kind(isa: str, value: float) -> None:
    weights = _head(16 * 40, 64, zero_points=True)
    bound, screen = _screened(weights, 640)
    x = torch.randn(1, 64)
    x[0, 3] = value
    with torch.no_grad():
        full, scores = bound.run([x], 0)[0], bound.run([x], 2)[0]
    if value <= 1e14 and value >= 0:
        assert _check(scores, full, 2) > 0
    else:  # bounds could overflow: it is read whole
        assert torch.equal(scores.view(torch.int32), full.view(torch.int32))
        assert screen.read() == (weights[0].nbytes, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_that_rounding_makes_equal(isa: str, dtype: torch.dtype) -> None:
    """Beyond the largest fp16, and below the smallest."""
    n, k = 16 * 40, 64
    for scale in (30.0, 1e-12):
        weights = layouts.pack_w8(torch.randint(140, 255, (n, k), dtype=torch.uint8), torch.rand(n) * scale)
        bound, _ = _screened(weights, n)
        x = torch.rand(1, k).to(dtype)
        with torch.no_grad():
            full, scores = bound.run([x], 0)[0], bound.run([x], 1)[0]
        assert torch.equal(scores == scores.max(), full == full.max())


def test_weights_against_their_bounds(isa: str) -> None:
    """The worst rows for the bounds: what the low bits add points along the activations, or against them."""
    n, k = 16 * 32, 96
    x = torch.randn(1, k)
    sign = x[0] > 0
    q = torch.full((n, k), 128, dtype=torch.uint8)
    q[0::2] = torch.where(sign, 135, 128).to(torch.uint8)  # low bits 7 and 0
    q[1::2] = torch.where(sign, 128, 135).to(torch.uint8)
    weights = layouts.pack_w8(q, torch.rand(n) * 0.01 + 0.01)
    bound, _ = _screened(weights, n)
    with torch.no_grad():
        full = bound.run([x], 0)[0]
        for best in (1, 5, 100):
            _check(bound.run([x], best)[0], full, best)


def test_only_a_single_row_and_few_of_the_best(isa: str) -> None:
    weights = _head(640, 64, zero_points=True)
    bound, screen = _screened(weights, 640)
    with torch.no_grad():
        for x, best in ((torch.randn(2, 64), 1), (torch.randn(1, 64), 100_000)):
            assert torch.equal(bound.run([x], best)[0], bound.run([x], 0)[0])
    assert screen.read() == (0, 0)


def test_what_is_no_head() -> None:
    """A result that something reads, float weights, a bias: nothing to screen."""
    n, weights = 64, _head(64, 64, zero_points=False)
    assert len(_bound(weights, n).head()) == 2
    program = torch.classes.unicorn.Program(3)
    none, size = program.constant(None), program.constant(n)
    out = program.call("unicorn::linear", "", [-1, 2, -1, -1], [0, 1, 2, none, size])
    program.outputs([out, program.call("aten::neg", "", [-1], [out])])
    assert program.bind([1, 2], weights, []).head() == []
    biased = torch.classes.unicorn.Program(4)
    out = biased.call("unicorn::linear", "", [-1, 2, -1, -1], [0, 1, 2, 3, biased.constant(n)])
    biased.outputs([out])
    bound = biased.bind([1, 2, 3], [*weights, torch.zeros(n)], [])
    assert bound.head() == []
    with pytest.raises(RuntimeError, match="no head"):
        bound.screen(torch.classes.unicorn.Screen(weights))


def test_weights_of_other_schemes_are_refused() -> None:
    four = layouts.pack_w4g32(torch.zeros(16, 32, dtype=torch.int8), torch.ones(16, 1, dtype=torch.float16))
    with pytest.raises(RuntimeError, match="8 bits"):
        torch.classes.unicorn.Screen(four)
