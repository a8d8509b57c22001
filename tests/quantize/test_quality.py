"""`compare`: exact on known distributions, and the embedded model stays within its bands."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from unicorn_backend import quantize
from unicorn_backend.errors import OptionError
from unicorn_backend.quantize.quality import _quantile_error, compare

# mean KL in nats on 192 tokens of WikiText-2 test, and the share of tokens that stay first
BANDS = {"default": (3e-4, 9e-4, 0.97), "q4": (5e-4, 1.6e-3, 0.95), "int8": (5e-5, 2.5e-4, 0.98)}


def fixed(logits: torch.Tensor) -> Any:
    """A model that gives the same logits [V] at every position."""

    def model(input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=logits.expand(*input_ids.shape, -1))

    return model


def test_known_distributions() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.5, 0.25])
    ids = torch.zeros(1, 400, dtype=torch.int64)
    got = compare(fixed(q.log()), fixed(p.log()), ids, window=100)
    assert got.tokens == 4 * 99
    assert got.kl_mean == pytest.approx(0.25 * math.log(2), abs=1e-6)
    assert got.kl_median == pytest.approx(got.kl_mean) and got.kl_99 == pytest.approx(got.kl_mean)
    assert got.kl_mean_se == pytest.approx(0.0, abs=1e-9)
    assert got.top1 == 0.0
    assert got.perplexity_reference == pytest.approx(2.0) and got.perplexity == pytest.approx(4.0)


def test_same_model_is_identical() -> None:
    model = fixed(torch.randn(50))
    got = compare(model, model, torch.randint(50, (2, 64)))
    assert (got.kl_mean, got.top1, got.kl_99) == (0.0, 1.0, 0.0)
    assert got.perplexity == got.perplexity_reference


def test_standard_error_is_that_of_independent_tokens() -> None:
    """For independent tokens block means and single values agree: sqrt(p (1 - p) / n)."""
    logits = torch.randn(1, 4096, 2).double()
    model = fixed(torch.tensor([1.0, 0.0]))
    reference = lambda input_ids, **_: SimpleNamespace(logits=logits)  # noqa: E731
    got = compare(model, reference, torch.zeros(1, 4096, dtype=torch.int64), window=4096)
    assert got.top1_se == pytest.approx((0.25 / 4095) ** 0.5, rel=0.25)
    loss = float(torch.tensor([0.0, -1.0]).exp().sum().log())  # of token 0, everywhere: no spread
    assert got.perplexity == pytest.approx(math.exp(loss)) and got.perplexity_se == pytest.approx(0.0, abs=1e-9)


def test_standard_error_of_the_median() -> None:
    """For n independent values of density f it is 1 / (2 f sqrt(n)); uniform: f = 1."""
    values = torch.rand(6400, generator=torch.Generator().manual_seed(1)).double()
    assert _quantile_error(values, 0.5) == pytest.approx(0.5 / 6400**0.5, rel=0.25)


@pytest.mark.parametrize("ids", [torch.zeros(1, 1, dtype=torch.int64), torch.zeros(0, 9, dtype=torch.int64)])
def test_too_short(ids: torch.Tensor) -> None:
    with pytest.raises(OptionError, match="at least 2 tokens"):
        compare(fixed(torch.zeros(3)), fixed(torch.zeros(3)), ids)


@pytest.mark.parametrize("recipe", BANDS)
def test_embedded_model(recipe: str, tiny: Any, make_tiny: Any, sample_ids: torch.Tensor) -> None:
    got = compare(quantize(make_tiny(), recipe), tiny, sample_ids[:, :192])
    low, high, top1 = BANDS[recipe]
    assert low < got.kl_mean < high
    assert got.top1 > top1
    assert got.perplexity == pytest.approx(got.perplexity_reference, rel=0.01)
