"""The choice of the next token: the tokens and the random numbers of torch and transformers."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from unicorn_backend.assets import load_native

load_native()
OPS = torch.ops.unicorn
SIZES = [1, 7, 63, 64, 65, 1000, 4097, 50257]


def scores_of(size: int, *, rows: int = 1, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Normal ones. In bf16 many are equal, as those of a model are."""
    drawn = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 3
    return drawn.to(dtype).float()


def stock(scores: torch.Tensor, top_k: int, top_p: float, keep: int, generator: torch.Generator) -> torch.Tensor:
    """transformers' and torch's."""
    ids = torch.zeros(1, 1, dtype=torch.long)
    if top_k:
        scores = TopKLogitsWarper(top_k, min_tokens_to_keep=keep)(ids, scores)
    if top_p < 1.0:
        scores = TopPLogitsWarper(top_p, min_tokens_to_keep=keep)(ids, scores)
    return torch.multinomial(scores.softmax(-1), 1, generator=generator)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_argmax_is_the_first_largest(size: int, dtype: torch.dtype) -> None:
    for seed in range(20):
        scores = scores_of(size, rows=3, seed=seed, dtype=dtype)
        assert torch.equal(OPS.argmax(scores), scores.argmax(-1))


def test_argmax_of_strange_rows() -> None:
    nan, inf = math.nan, math.inf
    rows = [
        [-0.0, 0.0, -1.0],
        [-1.0, -0.0, 0.0],
        [nan, 1.0, nan],
        [1.0, nan, inf],
        [-inf, -inf, -inf],
        [-inf, 0.0, inf],
    ]
    for row in rows:
        scores = torch.tensor([row])
        assert torch.equal(OPS.argmax(scores), scores.argmax(-1)), row
    transposed = torch.randn(100, 2).t()
    assert torch.equal(OPS.argmax(transposed), transposed.argmax(-1))


@pytest.mark.parametrize("top_k", [0, 1, 5, 64, 500])
@pytest.mark.parametrize("top_p", [0.05, 0.6, 0.95, 1.0])
def test_sample_draws_the_same_tokens(top_k: int, top_p: float) -> None:
    decided = tried = 0
    for seed in range(40):
        size, rows, keep = SIZES[seed % len(SIZES)], 1 + seed % 3, 1 + seed % 2
        scores = scores_of(size, rows=rows, seed=seed, dtype=torch.float32 if seed % 4 else torch.bfloat16)
        want, got = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
        for _ in range(3):
            before = got.get_state()
            expected = stock(scores, top_k, top_p, keep, want)
            tokens = OPS.sample(scores, max(top_k, keep) if top_k else 0, top_p, keep, got)
            tried += 1
            if tokens.shape[0] == 0:
                assert torch.equal(got.get_state(), before)
                got.set_state(want.get_state())
                continue
            decided += 1
            assert torch.equal(tokens, expected) and torch.equal(got.get_state(), want.get_state())
    assert decided > tried * (0.9 if top_k or top_p == 1.0 else 0.5)


def test_equal_scores_at_the_limit_are_not_told_apart() -> None:
    """A sort leaves them in any order: whichever wins is said only where all of them stay."""
    scores = torch.full((1, 64), 1.0)
    generator = torch.Generator().manual_seed(0)
    assert OPS.sample(scores, 0, 0.5, 1, generator).shape == (0, 1)
    assert OPS.sample(scores, 32, 1.0, 1, generator).shape == (1, 1), "top-k keeps all that equal the last"
    scores[0, 7] = 30.0
    assert OPS.sample(scores, 0, 0.5, 1, generator).item() == 7


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("limits", [(0, 1.0), (5, 1.0), (0, 0.9), (5, 0.9)])
def test_what_is_no_distribution_is_left_to_torch(bad: float, limits: tuple[int, float]) -> None:
    scores = torch.full((2, 100), bad)
    scores[0] = 1.0
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert OPS.sample(scores, *limits, 1, generator).shape == (0, 1)
    assert torch.equal(generator.get_state(), before)


def test_the_process_wide_generator() -> None:
    scores = scores_of(1000)
    torch.manual_seed(5)
    expected = torch.multinomial(scores.softmax(-1), 1), torch.rand(3)
    torch.manual_seed(5)
    got = OPS.sample(scores, 0, 1.0, 1), torch.rand(3)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_wrong_arguments() -> None:
    with pytest.raises(RuntimeError, match=r"argmax.*float32"):
        OPS.argmax(torch.zeros(1, 4).bfloat16())
    with pytest.raises(RuntimeError, match=r"sample.*float32"):
        OPS.sample(torch.zeros(4), 0, 1.0, 1)
    with pytest.raises(RuntimeError, match=r"top_p 1\.5"):
        OPS.sample(torch.zeros(1, 4), 0, 1.5, 1)
