"""Random packed weights, and the oracle with an error bound that is derived, not tuned.

`Approx` is a value with a bound on how far the fp32 kernel may be from it. Rounding adds to the bound;
a quantization adds a whole step wherever the bound reaches the next rounding boundary, because there the
kernel may rightly choose the neighbour.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from unicorn_backend import layouts, reference
from unicorn_backend.layouts import GROUP

SCHEMES = layouts.SCHEMES
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOKENS = (1, 2, 3, 5, 8, 13, 64)
UNIT = 2.0**-24  # largest relative error of one fp32 rounding
ACTIVATION_ERROR = 1e-6  # relative to |x|; test_activations.py holds the kernels to it
SLOPE = 1.2  # largest derivative of the activation functions (1.13 for gelu)


def make_weight(n: int, k: int, scheme: str) -> list[Tensor]:
    """Random [n, k] with entries of about 0.5 / sqrt(k), some rows and groups much smaller, in any scheme or dtype."""
    if scheme not in SCHEMES:
        return [(torch.randn(n, k) / k**0.5).to(getattr(torch, scheme))]
    scale = (torch.rand(n, -(-k // GROUP)) + 0.1) * torch.randn(n, 1).sign() / k**0.5
    if scheme == "w4g32":
        return layouts.pack_w4g32(torch.randint(-8, 8, (n, k), dtype=torch.int8), (0.2 * scale).half())
    if scheme == "w4n32":
        return layouts.pack_w4n32(torch.randint(0, 16, (n, k), dtype=torch.uint8), (0.02 * scale).half())
    if scheme == "w4m32":
        q, m = torch.randint(0, 16, (n, k), dtype=torch.uint8), torch.randn(n, -(-k // GROUP)) / k**0.5
        return layouts.pack_w4m32(q, (0.2 * scale).half(), m.half())
    if scheme in ("q4k", "q5k", "q6k"):
        return make_kquant(n, k, scheme)
    if scheme == "w8g32":
        q = torch.randint(-128, 128, (n, k), dtype=torch.int8)
        q[0, :], q[-1, :] = 127, -128
        return layouts.pack_w8g32(q, (0.01 * scale).half())
    stored = torch.randint(0, 256, (n, k), dtype=torch.uint8)
    stored[0, :] = 255  # the extremes that saturating instructions would get wrong
    stored[-1, :] = 0
    zero = torch.randint(0, 256, (n,), dtype=torch.uint8) if scheme == "w8a" else None
    return layouts.pack_w8(stored, (torch.rand(n) + 0.1) * 0.01 / k**0.5, zero)


def make_kquant(n: int, k: int, scheme: str) -> list[Tensor]:
    """Random values of all bits, with the extremes in the first two rows; `k` columns of whole super blocks."""
    bits, wide = int(scheme[1]), -(-k // 256) * 256
    q = torch.randint(0, 1 << bits, (n, wide), dtype=torch.uint8)
    low, high, dtype = (-128, 128, torch.int8) if scheme == "q6k" else (0, 64, torch.uint8)
    pairs = torch.randint(low, high, (n, wide // GROUP, 2)).to(dtype)
    q[0], q[-1] = 0, (1 << bits) - 1
    pairs[0], pairs[-1] = low, high - 1
    supers = torch.rand(n, wide // 256, 1 if scheme == "q6k" else 2) * 1e-3 / k**0.5
    w, pairs, supers = layouts.pack_kquant(q, pairs, supers.half(), bits)
    return [w[:, : -(-k // GROUP)].contiguous(), pairs[:, : -(-k // GROUP)].contiguous(), supers]


@dataclass
class Approx:
    """fp64 `value`, and `error`: how far an fp32 kernel may be from it, elementwise."""

    value: Tensor
    error: Tensor

    @staticmethod
    def exact(x: Tensor) -> Approx:
        return Approx(x.double(), torch.zeros(x.shape, dtype=torch.float64))

    def rounded(self, unit: float = UNIT) -> Approx:
        return Approx(self.value, self.error * (1 + unit) + unit * self.value.abs())

    def plus(self, other: Tensor | None) -> Approx:
        return self if other is None else Approx(self.value + other.double(), self.error).rounded()


def norm(x: Approx, w: Tensor | None, eps: float | None, offset: float) -> Approx:
    """RMS norm. The sum of squares is in 16 lanes, so K / 16 + 4 additions; sqrt and division halve and add."""
    if eps is None:
        return x
    width = x.value.shape[-1]
    mean = x.value.pow(2).mean(-1, keepdim=True) + eps
    factor = mean.rsqrt() * (1.0 if w is None else (w.double() + offset))
    relative_rms = (x.error * x.value.abs()).mean(-1, keepdim=True) / mean
    relative = relative_rms + (width / 16 + 16) * UNIT
    return Approx(x.value * factor, (x.error + x.value.abs() * relative) * factor.abs())


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """`a8g32` of fp32 [..., G, 32]: each of the two divisions rounds once (`127.0 / amax` would round twice)."""
    amax = x.abs().amax(-1)
    inverse = torch.where(amax > 0, torch.full_like(amax, 127.0) / amax, 0.0)
    return torch.round(x * inverse[..., None]), amax / torch.full_like(amax, 127.0)


def weight_values(w: list[Tensor], n: int, k: int) -> Tensor:
    """fp64 [n, k]; `layouts.dequantize` rounds its w8 products to fp32, which the kernels never do."""
    q, s, m = layouts.unpack(w, n, k)
    values = q.double() * layouts.per_column(s, k).double()
    return values if m is None else values + layouts.per_column(m, k).double()


def project(x: Approx, w: list[Tensor], bias: Tensor | None, n: int) -> Approx:
    """Quantized linear: exact integer sums, fp32 over G groups: (G + 4) roundings of the terms' absolute sum."""
    k, groups = x.value.shape[-1], -(-x.value.shape[-1] // GROUP)
    error = F.pad(x.error, (0, -k % GROUP)).unflatten(-1, (-1, GROUP))
    value = F.pad(x.value, (0, -k % GROUP)).unflatten(-1, (-1, GROUP))
    q, scale = quantize(value.float())
    amax = value.abs().amax(-1, keepdim=True).clamp_min(1e-300)
    scale_error = error.amax(-1, keepdim=True) / amax  # relative
    steps = value * 127 / amax
    reach = 127 * error / amax + steps.abs() * (scale_error + 3 * UNIT)
    flips = ((steps - steps.floor() - 0.5).abs() <= reach) & (error > 0)
    moved = scale.double()[..., None] * (flips + (q.abs() + 1) * (scale_error + 2 * UNIT) * (error > 0))
    weights = F.pad(weight_values(w, n, k), (0, -k % GROUP)).unflatten(-1, (-1, GROUP))
    a = q.double() * scale.double()[..., None]
    terms = torch.einsum("...gk,ngk->...ng", a, weights)
    sizes = _sizes_of_terms(a, w, n, k)
    moved = moved + 2.0**-48 * a.abs()  # fp64 rounds too: it shows where the integers of a group cancel to zero
    drift = torch.einsum("...gk,ngk->...n", moved, weights.abs())
    result = Approx(terms.sum(-1), drift + (2 * groups + 4) * UNIT * sizes)
    return result.plus(bias)


def _sizes_of_terms(a: Tensor, w: list[Tensor], n: int, k: int) -> Tensor:
    """Sum of |term| over what the kernel adds up: one term per group, and one more where there are minima."""
    q, s, m = layouts.unpack(w, n, k)
    values = F.pad(q.double(), (0, -k % GROUP)).unflatten(-1, (-1, GROUP))
    scale = s.double().expand(n, a.shape[-2])
    sizes = (torch.einsum("...gk,ngk->...ng", a, values) * scale).abs().sum(-1)
    return sizes if m is None else sizes + torch.einsum("...g,ng->...n", a.sum(-1).abs(), m.double().abs())


def gated(gate: Approx, up: Approx, act: str) -> Approx:
    """act(gate) * up."""
    value = reference.ACTIVATIONS[act](gate.value)
    error = SLOPE * gate.error + ACTIVATION_ERROR * gate.value.abs()
    product = Approx(value * up.value, error * up.value.abs() + (value.abs() + error) * up.error)
    return product.rounded()


def cut(gate: Approx, cutoff: float) -> Approx:
    """max(gate - (mean + cutoff * std), 0): nothing moves by more than what is compared does. Sums are in 16 lanes."""
    value, error = gate.value, gate.error
    mean, std = value.mean(-1, keepdim=True), value.std(-1, correction=0, keepdim=True)
    additions = (value.shape[-1] / 16 + 8) * UNIT
    of_mean = error.mean(-1, keepdim=True) + additions * value.abs().mean(-1, keepdim=True)
    of_distances = error + of_mean + UNIT * (value - mean).abs()
    of_std = of_distances.pow(2).mean(-1, keepdim=True).sqrt() + (additions + 2 * UNIT) * std
    of_threshold = of_mean + abs(cutoff) * of_std + 2 * UNIT * (mean.abs() + abs(cutoff) * std)
    above = value - (mean + cutoff * std)
    return Approx(above.clamp_min(0.0), error + of_threshold + UNIT * above.abs())


def ffn(  # type: ignore[no-untyped-def]
    x, norm_w, norm_eps, norm_offset, wg, wu, wd, bias, act, f, n, post_w, post_eps, post_offset, residual, cutoff=None
):
    """`int4_ffn`, or with a cutoff `sparse_ffn`, with its bound, before the rounding of the result."""
    h = norm(Approx.exact(x), norm_w, norm_eps, norm_offset)
    bg, bu, bd = bias or [None] * 3
    gate = project(h, wg, bg, f)
    product = gated(gate if cutoff is None else cut(gate, cutoff), project(h, wu, bu, f), act)
    y = norm(project(product, wd, bd, n), post_w, post_eps, post_offset)
    return y.plus(residual)


def unit_of(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding to `dtype`."""
    return torch.finfo(dtype).eps / 2


def assert_within(got: Tensor, want: Approx) -> None:
    """Every element within the bound, and the bound far below the signal, so that the test can fail."""
    unit = unit_of(got.dtype)
    bound = want.error * (1 + unit) + unit * want.value.abs() + torch.finfo(got.dtype).smallest_normal
    excess = ((got.double() - want.value).abs() - bound).max()
    assert excess <= 0, f"{float(excess):.3g} beyond the bound of {float(bound.max()):.3g}"
    signal = want.value.pow(2).mean().sqrt()
    share = bound.median() / signal  # not the mean: one neighbouring step on a small model is worth a percent
    assert share < 0.02, f"the bound says nothing: {float(share):.2%} of the signal"
