"""linear, embedding and rms_norm against the reference, within the derived bound."""

from __future__ import annotations

import pytest
import torch

from tests.ops.support import DTYPES, SCHEMES, TOKENS, Approx, assert_within, make_weight, norm, project, unit_of
from unicorn_backend import reference

OPS = torch.ops.unicorn
SHAPES = ((37, 100), (16, 32), (66, 416))  # [N, K], most of them no multiple of a tile


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear(isa: str, threads: int, scheme: str, dtype: torch.dtype) -> None:
    for n, k in SHAPES:
        w = make_weight(n, k, scheme)
        for m in TOKENS:
            x = torch.randn(m, k).to(dtype)
            bias = torch.randn(n).to(dtype) if m % 2 else None
            assert_within(OPS.linear(x, w, bias, n), project(Approx.exact(x), w, bias, n))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_extremes(isa: str, scheme: str) -> None:
    """All activations at the ends of int8, where 16-bit sums would saturate; a zero group; a huge and a tiny one."""
    w = make_weight(33, 128, scheme)
    x = torch.ones(4, 128)
    x[1, ::2] = -1
    x[2, :32], x[2, 32:64], x[2, 64:96] = 0, 1e30, 1e-30
    x[3] = -1
    assert_within(OPS.linear(x[[0, 1, 3]], w, None, 33), project(Approx.exact(x[[0, 1, 3]]), w, None, 33))
    assert_within(OPS.linear(x[2], w, None, 33), project(Approx.exact(x[2]), w, None, 33))
    assert not OPS.linear(torch.zeros(3, 128), w, None, 33).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_stays_visible(isa: str, bad: float) -> None:
    x = torch.randn(3, 64)
    x[1, 40] = bad
    y = OPS.linear(x, make_weight(32, 64, "w4g32"), None, 32)
    assert not y[1].isfinite().any()
    assert y[[0, 2]].isfinite().all()


def test_batch_shapes_and_strides(isa: str) -> None:
    w = make_weight(40, 64, "w8c")
    x = torch.randn(2, 3, 5, 64)
    y = OPS.linear(x, w, None, 40)
    assert y.shape == (2, 3, 5, 40)
    assert torch.equal(OPS.linear(x.transpose(0, 2), w, None, 40), y.transpose(0, 2))
    assert OPS.linear(x[:0], w, None, 40).shape == (0, 3, 5, 40)


@pytest.mark.parametrize("weight_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float_weight_is_eager(dtype: torch.dtype, weight_dtype: str) -> None:
    w = make_weight(40, 96, weight_dtype)
    x, bias = torch.randn(3, 96).to(dtype), torch.randn(40).to(w[0].dtype)
    want = torch.nn.functional.linear(x.to(w[0].dtype), w[0], bias).to(dtype)
    torch.testing.assert_close(OPS.linear(x, w, bias, 40), want, rtol=2 * unit_of(dtype), atol=1e-6)


@pytest.mark.parametrize("scheme", [*SCHEMES, "bfloat16", "float32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding_is_exact(isa: str, threads: int, scheme: str, dtype: torch.dtype) -> None:
    for rows, k in ((37, 100), (64, 32)):
        w = make_weight(rows, k, scheme)
        for ids in (torch.tensor([[rows - 1]]), torch.randint(0, rows, (3, 11))):
            got = OPS.embedding(ids, w, rows, k, dtype)
            assert torch.equal(got, reference.embedding(ids, w, rows, k, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [32, 100, 1152])
def test_rms_norm(isa: str, threads: int, dtype: torch.dtype, width: int) -> None:
    for m in TOKENS:
        x = torch.randn(m, width).to(dtype)
        for w, offset in ((None, 0.0), (torch.randn(width).to(dtype), 1.0), (torch.rand(width), 0.0)):
            assert_within(OPS.rms_norm(x, w, 1e-6, offset), norm(Approx.exact(x), w, 1e-6, offset))


def test_large_values_do_not_overflow_in_half(isa: str) -> None:
    x = torch.full((2, 64), 60000.0).half()
    assert_within(OPS.rms_norm(x, None, 1e-6, 0.0), norm(Approx.exact(x), None, 1e-6, 0.0))
