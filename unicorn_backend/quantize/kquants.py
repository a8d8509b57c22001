"""The schemes with two-level scales or minima: `w4m32` (Q4_1's values), `q4k`, `q5k`, `q6k` (GGUF's k-quants).

The plain-torch meaning of `ops/quantize_kquants.inl`, to the last bit: fp32, one rounding per written operation, sums
over the columns of a group in ascending order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from unicorn_backend.layouts import GROUP, Q6_ZERO, SUPER, pack_kquant, pack_w4m32

# How many steps inside the group's smallest and largest weight the levels begin and end (negative: outside), each
# fitted by least squares. Chosen greedily from a grid of quarter steps. Relative error on N(0, 1) with 16 and 32
# levels, before the scales are rounded: these 8 6.94 % and 3.35 %, 12 of them 6.89 % and 3.33 %, all 121 6.83 % and
# 3.28 %. llama.cpp's 21 (one end fixed) 6.99 %.
ENDS = ((0.25, 0.25), (0.5, -0.25), (-0.25, 0.25), (0.25, 0.0), (-1.0, 0.0), (0.0, 0.0), (-1.0, -1.0), (0.0, 0.5))
# Of q6k: the largest |w| of 16 becomes each of these, for both signs of the scale. N(0, 1): 1.66 %, ggml's 19 for one
# sign 1.77 %.
Q6_FACTORS = (27.0, 28.0, 29.0, 30.0, 31.0, 32.0)
HALF = GROUP // 2
MIN_AMAX = 2.0**-100  # below it a weight counts as zero
MIN_RANGE = 2.0**-20  # of weights within -1..1
MIN_SUM = 2.0**-40  # sums of weighted squares are 0, or above it
MIN_SPREAD = 2.0**-12  # variance of the levels over their mean square, below which they count as all the same
MAX_HALF = 65504.0


def quantize_w4m32(w: Tensor, importance: Tensor | None = None) -> tuple[Tensor, ...]:
    """INT4 with a minimum, groups of 32: value = s * q + m, q in 0..15, fp16 s and m."""
    x, inverse, amax = _normalised(w, GROUP)
    s, m = _affine(x, _column_weights(importance, w, GROUP), 15)
    s = (s * amax).clamp_max(MAX_HALF).half()
    m = ((m * amax).clamp_min(-MAX_HALF) + 0.0).half()
    q = torch.stack(list(_levels(x, s.float() * inverse, m.float() * inverse, 15)), dim=-1)
    return _cut(pack_w4m32(q.flatten(1).to(torch.uint8), s, m), w.shape[1])


def quantize_q4k(w: Tensor, importance: Tensor | None = None) -> tuple[Tensor, ...]:
    """Q4_K: value = d * s * q - dmin * m with q in 0..15, 6-bit s and m per 32 columns, fp16 d and dmin per 256."""
    return _quantize_affine(w, importance, 4)


def quantize_q5k(w: Tensor, importance: Tensor | None = None) -> tuple[Tensor, ...]:
    """Q5_K: Q4_K with q in 0..31."""
    return _quantize_affine(w, importance, 5)


def quantize_q6k(w: Tensor, importance: Tensor | None = None) -> tuple[Tensor, ...]:
    """Q6_K: value = d * s * (q - 32) with q in 0..63, int8 s per 16 columns, fp16 d per 256."""
    x, inverse, amax = _normalised(w, HALF)
    h = _column_weights(importance, w, HALF)
    best, scale = torch.full_like(amax, -1.0), torch.zeros_like(amax)
    for factor in Q6_FACTORS:
        for signed in (factor, -factor):
            a, b = torch.zeros_like(amax), torch.zeros_like(amax)
            for column, weight in zip(x, h, strict=True):
                q = torch.round((column * signed).clamp(-Q6_ZERO, Q6_ZERO - 1))
                a, b = a + (column * weight) * q, b + (q * weight) * q
            t = a / b.clamp_min(MIN_SUM)
            better = a * t > best
            best, scale = torch.where(better, a * t, best), torch.where(better, t, scale)
    scale = _by_super(scale * amax, 2 * SUPER)  # [n, blocks, 16]
    d = (scale.abs().amax(-1, keepdim=True) / 127.0).clamp_max(MAX_HALF).half()
    s = torch.round((scale * _reciprocal(d.float())).clamp(-127, 127))
    step = _reciprocal((d.float() * s).flatten(1) * inverse)
    q = torch.stack([torch.round((column * step).clamp(-Q6_ZERO, Q6_ZERO - 1)) for column in x], dim=-1) + Q6_ZERO
    pairs = s.to(torch.int8).view(w.shape[0], -1, 2)
    return _cut(pack_kquant(q.flatten(1).to(torch.uint8), pairs, d, 6), w.shape[1])


def _quantize_affine(w: Tensor, importance: Tensor | None, bits: int) -> tuple[Tensor, ...]:
    x, inverse, amax = _normalised(w, GROUP)
    h, top = _column_weights(importance, w, GROUP), (1 << bits) - 1
    scale, minimum = _affine(x, h, top)
    fitted = torch.stack([_by_super(part, SUPER) for part in (scale * amax, -minimum * amax)], dim=-1)
    supers = (fitted.amax(2) / 63.0 + 0.0).clamp_max(MAX_HALF).half()  # [n, blocks, 2]
    d = supers.float()[:, :, None]
    pairs = _best_neighbours(x, h, fitted * _reciprocal(d), d, inverse, top)  # [n, blocks, 8, 2]
    step, low = _steps(pairs, d, inverse)
    q = torch.stack(list(_levels(x, step, -low, top)), dim=-1)
    return _cut(
        pack_kquant(q.flatten(1).to(torch.uint8), pairs.to(torch.uint8).flatten(1, 2), supers, bits), w.shape[1]
    )


def _best_neighbours(x: list[Tensor], h: Tensor, wanted: Tensor, d: Tensor, inverse: Tensor, top: int) -> Tensor:
    """6-bit (scale, minimum) [n, blocks, 8, 2]: of the integers around `wanted`, the pair with the smallest error.

    Rounding each to the nearest leaves q4k at 7.08 % and q5k at 3.57 % on N(0, 1); this gives 7.00 % and 3.47 %.
    """
    below = torch.floor(wanted.clamp(0, 63))
    best, chosen = torch.full(inverse.shape, float("inf")), below
    for up in ((0, 0), (1, 0), (0, 1), (1, 1)):
        pairs = (below + torch.tensor(up)).clamp_max(63)
        step, low = _steps(pairs, d, inverse)
        error = torch.zeros_like(best)
        for column, q, weight in zip(x, _levels(x, step, -low, top), h, strict=True):
            difference = (q * step - low) - column
            error = error + (difference * weight) * difference
        better = error < best
        best = torch.where(better, error, best)
        chosen = torch.where(better.view(chosen.shape[:-1])[..., None], pairs, chosen)
    return chosen


def _steps(pairs: Tensor, d: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Step and minus the minimum of each group, [n, groups], in units of its largest weight."""
    step, low = (pairs * d).flatten(1, 2).unbind(-1)
    return step * inverse, low * inverse


def _affine(x: list[Tensor], h: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """(scale >= 0, minimum <= 0), each [n, groups], of least squares with levels 0..top, over `ENDS`."""
    low, high, total = (torch.zeros_like(x[0]) for _ in range(3))
    count = torch.zeros_like(h[0])
    for column, weight in zip(x, h, strict=True):
        low, high = torch.minimum(column, low), torch.maximum(column, high)
        total, count = total + column * weight, count + weight
    count, inverse = count.clamp_min(MIN_SUM), 1.0 / (high - low).clamp_min(MIN_RANGE)
    best, scale, minimum = torch.full_like(low, -1.0), torch.zeros_like(low), torch.zeros_like(low)
    for first, last in ENDS:
        levels = inverse * (top + first + last)
        offset = (-low * levels) - first
        n1, n2, nx = (torch.zeros_like(low) for _ in range(3))
        for column, weight in zip(x, h, strict=True):
            q = torch.round((column * levels + offset).clamp(0, top))
            weighted = q * weight
            n1, n2, nx = n1 + weighted, n2 + weighted * q, nx + weighted * column
        spread, square = count * n2 - n1 * n1, count * n2
        a = torch.where(spread > square * MIN_SPREAD, (count * nx - total * n1) / spread, torch.zeros_like(low))
        b = (total - a * n1) / count
        a = torch.where(b > 0, nx / n2.clamp_min(MIN_SUM), a).clamp_min(0.0)
        b = b.clamp_max(0.0)
        score = 2.0 * (a * nx + b * total) - ((a * a * n2 + 2.0 * a * b * n1) + count * b * b)
        better = score > best
        best = torch.where(better, score, best)
        scale, minimum = torch.where(better, a, scale), torch.where(better, b, minimum)
    return scale, minimum


def _levels(x: list[Tensor], step: Tensor, minimum: Tensor, top: int) -> Iterator[Tensor]:
    """fp32 [n, groups] for each column: its nearest level, 0 where step is 0."""
    inverse = _reciprocal(step)
    for column in x:
        yield torch.round(((column - minimum) * inverse).clamp(0, top))


def _reciprocal(x: Tensor) -> Tensor:
    """1 / x, 0 for 0."""
    return torch.where(x == 0, torch.zeros_like(x), 1.0 / torch.where(x == 0, 1.0, x))


def _normalised(w: Tensor, group: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """fp32 [n, groups] within -1..1 for each column of a group; the factor that made them so, and its reciprocal.

    Zeros fill up the last 256 columns.
    """
    whole = torch.nn.functional.pad(w.float(), (0, -w.shape[1] % (GROUP * SUPER)))
    x = whole.view(w.shape[0], -1, group).permute(2, 0, 1).contiguous()
    amax = x.abs().amax(0).clamp_min(MIN_AMAX)
    inverse = 1.0 / amax
    return list(x * inverse), inverse, amax


def _column_weights(importance: Tensor | None, w: Tensor, group: int) -> Tensor:
    """fp32 [group, 1, groups]: ones, or `importance` with zeros up to the last 256 columns."""
    missing = -w.shape[1] % (GROUP * SUPER)
    if importance is None:
        return torch.ones(group, 1, (w.shape[1] + missing) // group)
    return torch.nn.functional.pad(importance, (0, missing)).view(-1, group).t()[:, None]


def _cut(packed: list[Tensor], k: int) -> tuple[Tensor, ...]:
    """Without the groups past column k."""
    groups = -(-k // GROUP)
    first, second, third = packed
    third = third if third.dim() == 4 else third[:, :groups].contiguous()  # super scales stay
    return first[:, :groups].contiguous(), second[:, :groups].contiguous(), third


def _by_super(x: Tensor, count: int) -> Tensor:
    return x.view(x.shape[0], -1, count)
