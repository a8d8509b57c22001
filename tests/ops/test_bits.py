"""The same bits from every instruction set, on any number of threads, for any number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.ops.conftest import ISAS
from tests.ops.support import SCHEMES, make_weight
from tests.ops.test_regions import ffn_args, qkv_args

OPS = torch.ops.unicorn


def everywhere(run: Callable[[], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """`run` on every instruction set and thread count."""
    for isa in ISAS:
        OPS.set_isa(isa)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            yield f"{isa}, {threads} threads", run()
    OPS.set_isa("")


def same(results: Iterator[tuple[str, Tensor]]) -> None:
    first = next(results)
    for name, got in results:
        assert torch.equal(got, first[1]), f"{name} differs from {first[0]}"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("m", [1, 7, 64])
def test_linear(scheme: str, m: int) -> None:
    w, x, bias = make_weight(70, 200, scheme), torch.randn(m, 200), torch.randn(70)
    same(everywhere(lambda: OPS.linear(x, w, bias, 70)))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("m", [17, 31, 525])
def test_linear_of_many_tokens(scheme: str, m: int) -> None:
    """An odd number of tiles, more columns and tokens than are taken at a time, and short last blocks."""
    w, x = make_weight(70, 1100, scheme), torch.randn(m, 1100)
    same(everywhere(lambda: OPS.linear(x, w, None, 70)))


def test_torch_finds_its_tile_registers_again() -> None:
    """AMX state belongs to the thread, and oneDNN inside torch uses it too."""
    w, x = make_weight(70, 1100, "w4g32"), torch.randn(64, 1100)
    a, b = torch.randn(64, 256, dtype=torch.bfloat16), torch.randn(256, 64, dtype=torch.bfloat16)
    OPS.set_isa("")
    torch.set_num_threads(2)
    ours, theirs = OPS.linear(x, w, None, 70), a @ b
    for _ in range(3):
        assert torch.equal(OPS.linear(x, w, None, 70), ours) and torch.equal(a @ b, theirs)


@pytest.mark.parametrize("schemes", [("w4g32",) * 3, ("w4g32", "w8c", "w4g32"), ("w8a",) * 3], ids=str)
def test_ffn_of_many_tokens(schemes: tuple[str, str, str]) -> None:
    args = ffn_args(
        45, 1100, 120, 70, schemes, torch.float32, act="silu", pre=True, post=True, residual=True, bias=True
    )
    same(everywhere(lambda: OPS.int4_ffn(*args)))


@pytest.mark.parametrize("act", ["gelu_tanh", "gelu", "silu", "relu"])
@pytest.mark.parametrize("m", [1, 13])
def test_ffn(act: str, m: int) -> None:
    on = {"pre": True, "post": True, "residual": True, "bias": True}
    args = ffn_args(m, 100, 120, 70, ("w4g32", "w8c", "w8a"), torch.float32, act=act, **on)
    same(everywhere(lambda: OPS.int4_ffn(*args)))


@pytest.mark.parametrize("m", [1, 13, 45])
def test_sparse_ffn(m: int) -> None:
    on = {"pre": True, "post": True, "residual": True, "bias": True}
    args = ffn_args(m, 100, 496, 70, ("w4g32", "w8c", "w8a"), torch.float32, **on)
    same(everywhere(lambda: OPS.sparse_ffn(*args, 1.2)))
    whole = OPS.sparse_ffn(*args, 1.2)
    assert torch.equal(OPS.sparse_ffn(args[0][:1], *args[1:-1], args[-1][:1], 1.2), whole[:1])


@pytest.mark.parametrize("t", [1, 13])
def test_qkv(t: int) -> None:
    args = qkv_args(1, t, 100, (4, 2, 40), "w4g32", torch.float32, pre=True, norm=True, rotary=True, bias=True)
    same(everywhere(lambda: torch.cat([y.flatten() for y in OPS.int8_qkv(*args)])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rms_norm(dtype: torch.dtype) -> None:
    x, w = torch.randn(5, 100).to(dtype), torch.randn(100)
    same(everywhere(lambda: OPS.rms_norm(x, w, 1e-6, 1.0)))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_token_does_not_see_its_neighbours(isa: str, scheme: str) -> None:
    """Row i of a batch is what the row alone gives: speculative decoding and batching change nothing."""
    args = ffn_args(64, 64, 96, 48, (scheme,) * 3, torch.float32, pre=True, post=True, residual=True)
    x, residual = args[0], args[-1]
    whole = OPS.int4_ffn(*args)
    for m in (1, 2, 3, 5, 8, 13):
        part = OPS.int4_ffn(x[:m], *args[1:-1], residual[:m])
        assert torch.equal(part, whole[:m]), m
