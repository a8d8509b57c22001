"""int4_ffn, int8_qkv and the end of int8_attention against the reference, within the derived bound."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.support import DTYPES, SCHEMES, TOKENS, Approx, assert_within, ffn, make_weight, norm, project
from unicorn_backend import reference
from unicorn_backend.ops import ACTIVATIONS

OPS = torch.ops.unicorn
OPTIONS = list(itertools.product((False, True), repeat=3))  # pre-norm, post-norm, residual


def ffn_args(m: int, k: int, f: int, n: int, schemes: tuple[str, str, str], dtype: torch.dtype, **on: Any) -> list[Any]:
    """Arguments of int4_ffn; `on`: pre, post, residual, bias, act."""
    weights = [make_weight(rows, k_, s) for rows, k_, s in zip((f, f, n), (k, k, f), schemes, strict=True)]
    weights[0][1] = weights[0][1] * 4  # gates of about 1, where the activation function bends
    bias = [torch.randn(f) * 0.1, torch.randn(f) * 0.1, torch.randn(n) * 0.1] if on.get("bias") else []
    pre = (torch.rand(k).to(dtype), 1e-6, 1.0) if on.get("pre") else (None, None, 0.0)
    post = (torch.rand(n).to(dtype), 1e-6, 0.0) if on.get("post") else (None, None, 0.0)
    residual = torch.randn(m, n).to(dtype) if on.get("residual") else None
    x = torch.randn(m, k).to(dtype)
    return [x, *pre, *weights, bias, on.get("act", "gelu_tanh"), f, n, *post, residual]


@pytest.mark.parametrize("schemes", [*((s, s, s) for s in SCHEMES), ("w8c", "w4g32", "w8a")], ids="-".join)
def test_ffn(isa: str, threads: int, schemes: tuple[str, str, str]) -> None:
    cases = zip(TOKENS, itertools.cycle(OPTIONS), itertools.cycle(DTYPES))
    for index, (m, (pre, post, residual), dtype) in enumerate(cases):
        k, f, n = ((100, 72, 37), (64, 48, 64))[index % 2]
        args = ffn_args(m, k, f, n, schemes, dtype, pre=pre, post=post, residual=residual, bias=index % 3 == 0)
        assert_within(OPS.int4_ffn(*args), ffn(*args))


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_ffn_activations_and_options(isa: str, act: str, options: tuple[bool, bool, bool]) -> None:
    pre, post, residual = options
    args = ffn_args(3, 64, 96, 48, ("w4g32",) * 3, torch.float32, pre=pre, post=post, residual=residual, act=act)
    assert_within(OPS.int4_ffn(*args), ffn(*args))


@pytest.mark.parametrize("schemes", [("w4g32",) * 3, ("w8c", "w4g32", "w8a")], ids="-".join)
@pytest.mark.parametrize("cutoff", [1.6449, 0.5, -0.5])
@pytest.mark.parametrize("m", [1, 3, 45])
def test_sparse_ffn(isa: str, threads: int, schemes: tuple[str, str, str], cutoff: float, m: int) -> None:
    args = ffn_args(m, 100, 1008, 37, schemes, torch.float32, pre=True, post=m > 1, residual=True, bias=m == 3)
    assert_within(OPS.sparse_ffn(*args, cutoff), ffn(*args, cutoff))


@pytest.mark.parametrize("m", [1, 40])
def test_sparse_ffn_reads_only_open_rows(isa: str, m: int) -> None:
    """Rows of `up` that would make everything NaN, behind gates that are closed for all tokens."""
    args = ffn_args(m, 64, 256, 48, ("w4g32",) * 3, torch.float32, bias=True)
    args[7][0] = torch.cat([torch.full((128,), 60.0), torch.full((128,), -60.0)])  # gates of the first half are open
    clean = OPS.sparse_ffn(*args, 0.0)
    q, scales = args[5]
    scales = scales.clone()
    scales[8:] = float("nan")
    args[5] = [q, scales]
    assert clean.isfinite().all() and torch.equal(OPS.sparse_ffn(*args, 0.0), clean)
    assert OPS.int4_ffn(*args).isnan().all()


def test_sparse_ffn_with_float_weights_and_odd_widths() -> None:
    args = ffn_args(5, 64, 96, 48, ("w4g32",) * 3, torch.bfloat16, pre=True, post=True, residual=True)
    args[4] = make_weight(96, 64, "bfloat16")
    got, want = OPS.sparse_ffn(*args, 0.5).float(), reference.sparse_ffn(*args, 0.5).float()
    assert (got - want).norm() < 0.01 * want.norm()
    with pytest.raises(RuntimeError, match="sparse_ffn: f: got 72, expected a multiple of 16"):
        OPS.sparse_ffn(*ffn_args(1, 64, 72, 48, ("w4g32",) * 3, torch.float32), 1.0)


@pytest.mark.parametrize("schemes", [("bfloat16",) * 3, ("bfloat16", "w4g32", "w8c"), ("w4g32", "w8c", "bfloat16")])
def test_ffn_with_float_weights(schemes: tuple[str, str, str]) -> None:
    """Float weights round like eager: the bound is bf16 roundings between the steps, not derived further."""
    args = ffn_args(5, 64, 96, 48, ("w4g32",) * 3, torch.bfloat16, pre=True, post=True, residual=True)
    for i, (scheme, rows, k) in enumerate(zip(schemes, (96, 96, 48), (64, 64, 96), strict=True)):
        args[4 + i] = make_weight(rows, k, scheme)
    got, want = OPS.int4_ffn(*args).float(), reference.int4_ffn(*args).float()
    assert (got - want).norm() < 0.01 * want.norm()


def qkv_args(
    b: int, t: int, k: int, dims: tuple[int, int, int], scheme: str, dtype: torch.dtype, **on: Any
) -> list[Any]:
    """Arguments of int8_qkv; dims = heads, kv_heads, head_dim; `on`: pre, norm, rotary, bias,
    shared, turned, interleaved, v_norm."""
    heads, kv_heads, d = dims
    rows = [heads * d, kv_heads * d, kv_heads * d]
    weights = [make_weight(n, k, scheme) for n in rows]
    pre = (torch.rand(k).to(dtype), 1e-6, 1.0) if on.get("pre") else (None, None, 0.0)
    qk = (torch.rand(d), torch.rand(d), 1e-6, 1.0) if on.get("norm") else (None, None, None, 0.0)
    angle = torch.rand(1 if on.get("shared", True) else b, t, on.get("turned", d)) * 6
    pairs = on.get("interleaved", False), on.get("v_norm", False)
    rotary = (angle.cos().to(dtype), angle.sin().to(dtype)) if on.get("rotary") else (None, None)
    bias = [torch.randn(n) for n in rows] if on.get("bias") else []
    return [torch.randn(b, t, k).to(dtype), *pre, *weights, bias, *qk, *rotary, heads, kv_heads, d, *pairs]


def qkv_bounds(args: list[Any]) -> list[Approx]:
    """int8_qkv with bounds."""
    x, norm_w, eps, offset, wq, wk, wv, bias, qw, kw, qk_eps, qk_offset, cos, sin, heads, kv_heads, d, *pairs = args
    h = norm(Approx.exact(x), norm_w, eps, offset)
    out = []
    biases, norms, counts = bias or [None] * 3, (qw, kw, None), (heads, kv_heads, kv_heads)
    for w, b, w_norm, count in zip((wq, wk, wv), biases, norms, counts, strict=True):
        y = project(h, w, b, count * d)
        y = Approx(*(part.unflatten(-1, (count, d)).transpose(1, 2) for part in (y.value, y.error)))
        if len(out) == 2:
            out.append(norm(y, None, qk_eps if pairs[1] else None, 0.0))
        else:
            out.append(rotated(norm(y, w_norm, qk_eps, qk_offset), cos, sin, pairs[0]))
    return out


def rotated(x: Approx, cos: Tensor | None, sin: Tensor | None, interleaved: bool) -> Approx:
    """Rotary embedding: two products, one sum."""
    if cos is None or sin is None:
        return x

    def size(part: Tensor) -> Tensor:
        """|part| under |cos| and |sin|; what is not rotated stays."""
        turned = part[..., : cos.shape[-1]].abs()
        other = reference.swapped(turned, interleaved).abs()
        both = turned * cos.double().abs().unsqueeze(1) + other * sin.double().abs().unsqueeze(1)
        return torch.cat((both, part[..., cos.shape[-1] :].abs()), -1)

    value = reference.rotated(x.value, cos, sin, interleaved)
    return Approx(value, size(x.error) * (1 + 1e-6) + 3 * 2.0**-24 * size(x.value))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rotary", [False, True])
def test_qkv(isa: str, threads: int, scheme: str, rotary: bool) -> None:
    for index, (b, t) in enumerate(((1, 1), (1, 5), (2, 3), (2, 13), (1, 64))):
        dims = ((4, 1, 32), (2, 2, 20), (3, 1, 64))[index % 3]
        on = {"pre": index % 2 == 0, "norm": index % 3 != 1, "bias": index == 2, "shared": index != 3, "rotary": rotary}
        args = qkv_args(b, t, 100, dims, scheme, DTYPES[index % 3], **on)
        for got, want in zip(OPS.int8_qkv(*args), qkv_bounds(args), strict=True):
            assert got.is_contiguous()
            assert_within(got, want)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("turned", [8, 20, 34, 40])
def test_qkv_partly_rotated(isa: str, threads: int, interleaved: bool, turned: int) -> None:
    """Widths within, at and beyond a vector of 16; a value with a norm of its own."""
    on = {"norm": True, "rotary": True, "turned": turned, "interleaved": interleaved, "v_norm": True}
    args = qkv_args(2, 3, 64, (3, 1, 40), "w8c", DTYPES[turned % 3], **on)
    for got, want in zip(OPS.int8_qkv(*args), qkv_bounds(args), strict=True):
        assert_within(got, want)


def test_rotary_reference_is_a_rotation_of_pairs() -> None:
    """Against complex numbers: pairs half the width apart, or neighbours."""
    x, angle = torch.randn(1, 2, 3, 12, dtype=torch.float64), torch.rand(1, 3, 4, dtype=torch.float64)
    for interleaved in (False, True):
        table = angle.repeat_interleave(2, -1) if interleaved else torch.cat((angle, angle), -1)
        got = reference.rotated(x, table.cos(), table.sin(), interleaved)
        pairs = x[..., :8].unflatten(-1, (4, 2) if interleaved else (2, 4))
        real, imaginary = pairs.unbind(-1 if interleaved else -2)
        turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)
        want = torch.stack((turned.real, turned.imag), -1 if interleaved else -2).flatten(-2)
        assert torch.allclose(got, torch.cat((want, x[..., 8:]), -1), rtol=1e-12, atol=1e-14)


def test_qkv_mixed_with_a_float_weight() -> None:
    args = qkv_args(2, 3, 64, (2, 1, 32), "w4g32", torch.bfloat16, pre=True, norm=True, rotary=True)
    args[6] = make_weight(32, 64, "bfloat16")
    for got, want in zip(OPS.int8_qkv(*args), reference.int8_qkv(*args), strict=True):
        assert (got.float() - want.float()).norm() < 0.01 * want.float().norm()


@pytest.mark.parametrize("scheme", [*SCHEMES, "bfloat16"])
def test_attention_output(isa: str, threads: int, scheme: str) -> None:
    """One key per head: the softmax is 1, so the core is exact and what remains is projection, norm, residual."""
    b, heads, d, n = 2, 4, 20, 37
    w, post_w = make_weight(n, heads * d, scheme), torch.rand(n)
    q, k, v = (torch.randn(b, h, 1, d).bfloat16() for h in (heads, 2, 2))
    bo, residual = torch.randn(n), torch.randn(b, 1, n).bfloat16()
    got = OPS.int8_attention(q, k, v, None, True, 0.3, 0.0, w, bo, n, post_w, 1e-6, 1.0, residual)
    if scheme == "bfloat16":
        want = reference.int8_attention(q, k, v, None, True, 0.3, 0.0, w, bo, n, post_w, 1e-6, 1.0, residual)
        assert (got.float() - want.float()).norm() < 0.01 * want.float().norm()
        return
    joined = v.repeat_interleave(2, 1).transpose(1, 2).flatten(2)
    assert_within(got, norm(project(Approx.exact(joined), w, bo, n), post_w, 1e-6, 1.0).plus(residual))
