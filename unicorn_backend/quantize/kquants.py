"""The schemes with two-level scales or minima: `w4m32` (Q4_1's values), `q4k`, `q5k`, `q6k` (GGUF's k-quants).

In plain torch and slow: 3 to 6 MB of bf16 per second on a busy two-core machine. What they are for is reading
GGUF files; no recipe uses them. Sums go over the columns of a group in ascending order, on any machine.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unicorn_backend.layouts import GROUP, Q6_ZERO, SUPER, pack_kquant, pack_w4m32

# The range of a group is shrunk to these shares and fitted by least squares. Relative error on N(0, 1) with 16 levels:
# the share 1 7.52 %, these 6 7.31 %, 20 shares from 0.7 to 1.08 7.25 %.
SHARES = (0.8, 0.85, 0.9, 0.95, 1.0, 1.05)
HALF = GROUP // 2
MIN_AMAX = 2.0**-100  # below it a weight counts as zero
MAX_HALF = 65504.0


def quantize_w4m32(w: Tensor) -> tuple[Tensor, ...]:
    """INT4 with a minimum, groups of 32: value = s * q + m, q in 0..15, fp16 s and m."""
    x = _columns(w, GROUP)
    s, m = (part.clamp(-MAX_HALF, MAX_HALF).half() for part in _affine(x, 15))
    q = _levels(x, s.float(), m.float(), 15)
    return _cut(pack_w4m32(q, s, m), w.shape[1])


def quantize_q4k(w: Tensor) -> tuple[Tensor, ...]:
    """Q4_K: value = d * s * q - dmin * m with q in 0..15, 6-bit s and m per 32 columns, fp16 d and dmin per 256."""
    return _quantize_affine(w, 4)


def quantize_q5k(w: Tensor) -> tuple[Tensor, ...]:
    """Q5_K: Q4_K with q in 0..31."""
    return _quantize_affine(w, 5)


def quantize_q6k(w: Tensor) -> tuple[Tensor, ...]:
    """Q6_K: value = d * s * (q - 32) with q in 0..63, int8 s per 16 columns, fp16 d per 256."""
    x = _columns(w, HALF)
    amax = torch.stack(x).abs().amax(0).clamp_min(MIN_AMAX)
    best, scale = torch.full_like(amax, -1.0), torch.zeros_like(amax)
    for sign in (1.0, -1.0):
        for share in SHARES:
            a, b = torch.zeros_like(amax), torch.zeros_like(amax)
            for column in x:
                part = column / amax
                q = torch.round(part * (sign * Q6_ZERO / share)).clamp(-Q6_ZERO, Q6_ZERO - 1)
                a, b = a + part * q, b + q * q
            t = a / b.clamp_min(1.0)
            better = a * t > best
            best, scale = torch.where(better, a * t, best), torch.where(better, t * amax, scale)
    scale = _by_super(scale, 2 * SUPER)  # [n, blocks, 16]
    d = (scale.abs().amax(-1, keepdim=True) / 127.0).clamp_max(MAX_HALF).half()
    s = _ratio(scale, d.float()).clamp(-127, 127)
    step = (d.float() * s).flatten(1)
    q = torch.stack([_ratio(column, step) for column in x], dim=-1).clamp(-Q6_ZERO, Q6_ZERO - 1) + Q6_ZERO
    pairs = s.to(torch.int8).view(w.shape[0], -1, 2)
    return _cut(pack_kquant(q.flatten(1).to(torch.uint8), pairs, d, 6), w.shape[1])


def _quantize_affine(w: Tensor, bits: int) -> tuple[Tensor, ...]:
    x, top = _columns(w, GROUP), (1 << bits) - 1
    fitted = torch.stack([_by_super(part, SUPER) for part in _affine(x, top)], dim=-1)  # [n, blocks, 8, 2]
    fitted = fitted * torch.tensor([1.0, -1.0])
    supers = (fitted.amax(2) / 63.0).clamp_max(MAX_HALF).half()  # [n, blocks, 2]
    pairs = _ratio(fitted, supers.float()[:, :, None]).clamp(0, 63)
    step, minimum = (supers.float()[:, :, None] * pairs).flatten(1, 2).unbind(-1)
    q = _levels(x, step, -minimum, top)
    return _cut(pack_kquant(q, pairs.to(torch.uint8).flatten(1, 2), supers, bits), w.shape[1])


def _affine(x: list[Tensor], top: int) -> tuple[Tensor, Tensor]:
    """(scale >= 0, minimum <= 0), each [n, groups], of least squares with levels 0..top, over `SHARES` of the range."""
    amax = torch.stack(x).abs().amax(0).clamp_min(MIN_AMAX)
    x = [column / amax for column in x]
    low, high, total = torch.zeros_like(amax), torch.zeros_like(amax), torch.zeros_like(amax)
    for column in x:
        low, high, total = torch.minimum(low, column), torch.maximum(high, column), total + column
    best, scale, minimum = torch.full_like(low, -1.0), torch.zeros_like(low), torch.zeros_like(low)
    count = float(len(x))
    for share in SHARES:
        start, step = (low + high) / 2 - (high - low) * (share / 2), (high - low) * (share / top)
        n1, n2, nx = torch.zeros_like(low), torch.zeros_like(low), torch.zeros_like(low)
        for column in x:
            q = _ratio(column - start, step).clamp(0, top)
            n1, n2, nx = n1 + q, n2 + q * q, nx + q * column
        a = (count * nx - total * n1) / (count * n2 - n1 * n1).clamp_min(1.0)
        b = (total - a * n1) / count
        a = torch.where(b > 0, nx / n2.clamp_min(1.0), a).clamp_min(0.0)
        b = b.clamp_max(0.0)
        score = 2 * (a * nx + b * total) - (a * a * n2 + 2 * a * b * n1 + count * b * b)
        better = score > best
        best = torch.where(better, score, best)
        scale, minimum = torch.where(better, a, scale), torch.where(better, b, minimum)
    return scale * amax, minimum * amax


def _levels(x: list[Tensor], step: Tensor, minimum: Tensor, top: int) -> Tensor:
    """uint8 [n, k]: the nearest level of each column."""
    q = torch.stack([_ratio(column - minimum, step) for column in x], dim=-1)
    return q.clamp(0, top).flatten(1).to(torch.uint8)


def _ratio(x: Tensor, step: Tensor) -> Tensor:
    """x / step to the nearest integer, 0 where step is 0."""
    return torch.round(torch.where(step == 0, torch.zeros_like(x), x / torch.where(step == 0, 1.0, step)))


def _columns(w: Tensor, group: int) -> list[Tensor]:
    """fp32 [n, groups] for each column of a group; zeros fill up the last 256 columns."""
    whole = torch.nn.functional.pad(w.float(), (0, -w.shape[1] % (GROUP * SUPER)))
    return list(whole.view(w.shape[0], -1, group).permute(2, 0, 1).contiguous())


def _cut(packed: list[Tensor], k: int) -> tuple[Tensor, ...]:
    """Without the groups past column k."""
    groups = -(-k // GROUP)
    first, second, third = packed
    third = third if third.dim() == 4 else third[:, :groups].contiguous()  # super scales stay
    return first[:, :groups].contiguous(), second[:, :groups].contiguous(), third


def _by_super(x: Tensor, count: int) -> Tensor:
    return x.view(x.shape[0], -1, count)
