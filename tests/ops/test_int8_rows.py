"""Attention over int8 rows of K and V, on every instruction set, against fp64 over the values that they stand for."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.ops.test_attention import KEYS, MASKS, QUERIES, expected, heads_last, make_mask, tolerance
from unicorn_backend import reference
from unicorn_backend.assets import load_native

load_native()
ISAS = torch.ops.unicorn.isas()
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((1, 64, 64), (2, 256, 256), (4, 80, 80), (8, 33, 17), (1, 7, 130), (2, 1, 1))  # group, D, Dv


@pytest.fixture(autouse=True)
def best_isa_again():
    yield
    torch.ops.unicorn.set_isa("")


@pytest.mark.parametrize("isa", ISAS)
def test_grid(isa: str) -> None:
    torch.ops.unicorn.set_isa(isa)
    for number, (t, kind) in enumerate(itertools.product(QUERIES, MASKS)):
        (group, d, dv), s, dtype = SHAPES[number % 6], KEYS[number % 5], DTYPES[number % 3]
        causal, softcap, scale = number % 2 == 0, (0.0, 30.0)[number % 4 == 1], d**-0.5
        q = heads_last(2, 2 * group, t, d, dtype)
        k, v = (torch.ops.unicorn.quantize_rows(torch.randn(2, 2, s, w)) for w in (d, dv))
        mask = make_mask(kind, 2, 2 * group, t, s, torch.float32)
        identity = [torch.eye(2 * group * dv)]
        got = torch.ops.unicorn.int8_attention(
            q.float(), k, v, mask, causal, scale, softcap, identity, None, 2 * group * dv, None, None, 0.0, None
        )
        plain = reference.dequantize_rows(k), reference.dequantize_rows(v)
        want = expected(q, *plain, mask, causal, scale, softcap).flatten(2)
        # Scales are applied to sums of D products (K) and to weights (V): one rounding more each.
        bound = tolerance(q, *plain, mask, scale, softcap) * 1.5
        assert float((got.double() - want).abs().max()) <= bound, (t, kind, d, s)


def test_rows_and_values_cannot_be_mixed() -> None:
    q, k, v = torch.randn(1, 2, 1, 8), torch.ops.unicorn.quantize_rows(torch.randn(1, 2, 5, 8)), torch.randn(1, 2, 5, 8)
    with pytest.raises(RuntimeError, match="got dtypes Float, Char, Float, expected three equal ones, or k and v from"):
        torch.ops.unicorn.int8_attention(
            q, k, v, None, False, 1.0, 0.0, [torch.eye(16)], None, 16, None, None, 0.0, None
        )
