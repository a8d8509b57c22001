"""The mathematics of the schemes: quantize a float weight straight into its packed layout.

`unicorn::quantize_<scheme>` takes a float weight [N, K] (bf16, fp16 or fp32) and returns the packed
tensors of the contract (`ops.py`). The functions here and in `kquants.py` define every result to the last bit
(fp32, one rounding per written operation, sums over k in ascending order); the native kernels in
`ops/quantize_impl.inl` do the same operations on 16 rows at a time. A NaN or Inf raises ValueError.
The schemes in SEARCHED take `importance`, fp32 [K] above 0: how much the squared error of a column counts.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from unicorn_backend import assets
from unicorn_backend.errors import NativeLibraryError, OptionError
from unicorn_backend.layouts import (
    CODEBOOK,
    GROUP,
    PARTS,
    SCHEMES,
    W8_ZERO,
    dequantize,
    empty_packed,
    pack_w4g32,
    pack_w4n32,
    pack_w8,
    pack_w8g32,
)
from unicorn_backend.ops import LIBRARY
from unicorn_backend.quantize import kquants

log = logging.getLogger(__name__)

# Factors of the w4g32 search: the group's largest |w| is mapped to each of these, for both signs of
# the scale. Relative error on N(0,1): 8 factors 8.10 %, 15 factors 8.09 %, 61 factors 8.09 %, and
# 8.62 % for the single factor 8 of ggml's Q4_0. A finer search only costs time. Weighting the error
# by w^2 (ggml's rule) is worse where it counts: mean KL of the embedded model with every linear in
# w4g32 is 0.00097 unweighted, 0.00104 weighted (standard error 0.00001), 0.00102 for Q4_0.
FACTORS = tuple(6.25 + 0.375 * i for i in range(8))  # 6.25 .. 8.875, exact in fp32

# The same for w4n32, in units of its codebook. On N(0, 1): 4 factors 7.42 %, these 6 7.36 %, 24 factors 7.34 %;
# GGUF's IQ4_NL without a search (the largest |w| becomes -127) 7.92 %.
CODEBOOK_FACTORS = tuple(100.0 + 8.0 * i for i in range(6))  # 100 .. 140
THRESHOLDS = tuple((a + b) / 2 for a, b in itertools.pairwise(CODEBOOK))  # exact; a value on one goes down

# A weight trained for Q4_0 and stored as bf16 is the rounding of a grid: the fitted error is that of the rounding,
# below 2^-18 of the squares (of other weights some 2^-7). Then the scales beside the fitted one are tried, in
# units of its last place, for one whose grid rounds to exactly the weights. bf16 changes no weight by more than
# 2^-9 of it, so nor is the fitted scale off by more: 4 units in the last of fp16's 11 bits.
GRID_ERROR = 2.0**-16
NEIGHBOURS = (-1, 1, -2, 2, -3, 3, -4, 4)
MIN_GRID_SCALE = 5  # bits of fp16: its neighbours have its sign

MIN_AMAX = 2.0**-100  # below it a weight counts as zero: its reciprocal stays finite and normal
MAX_SCALE = 65504.0  # largest fp16

SEARCHED = ("w4g32", "w4n32", "w4m32", "q4k", "q5k", "q6k")  # schemes whose scales minimise an error

for _scheme in SCHEMES:
    _arguments = "Tensor w, Tensor? importance=None" if _scheme in SEARCHED else "Tensor w"
    LIBRARY.define(f"quantize_{_scheme}({_arguments}) -> ({', '.join(['Tensor'] * len(PARTS[_scheme]))})")

# count_nonfinite: how many elements of a float tensor of any shape are NaN or Inf.
LIBRARY.define("count_nonfinite(Tensor w) -> int")

# quantization_noise: sums of w^2 and of (w - dequantized)^2 over a weight, in fp32 per group and fp64 above.
LIBRARY.define("quantization_noise(Tensor w, Tensor[] packed) -> (float, float)")

# quantize_isa: choose the instruction set of the native quantizer ("" = the best); for tests.
LIBRARY.define("quantize_isa(str name) -> str")


@functools.cache
def ensure_kernels() -> None:
    """Load the native kernels, once per process; without them the ops run in plain torch, with a warning.

    Called where packed weights come into being and not on import, which `import torch` does.
    """
    try:
        assets.load_native()
    except NativeLibraryError as error:
        from unicorn_backend import reference

        log.warning("the native library is missing: quantized models run in plain torch, slowly. %s", error)
        for name, function in reference.FUNCTIONS.items():
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"unicorn::{name}", "CPU"):
                LIBRARY.impl(name, function, "CPU")


def quantize_weight(w: Tensor, scheme: str, importance: Tensor | None = None) -> list[Tensor]:
    """Float weight [N, K] -> its packed tensors. Raises ValueError for NaN or Inf.

    importance: fp32 [K] above 0, weights of the columns' squared errors; schemes outside SEARCHED have no use for it.
    """
    ensure_kernels()
    if scheme not in SCHEMES:
        raise OptionError(f"scheme: got {scheme!r}, allowed are {', '.join(SCHEMES)}")
    run = getattr(torch.ops.unicorn, f"quantize_{scheme}")
    return list(run(w, importance) if scheme in SEARCHED else run(w))


def quantization_noise(w: Tensor, packed: list[Tensor]) -> tuple[float, float]:
    """(signal, noise): sums of squares of a float weight and of what packing changed."""
    signal, noise = torch.ops.unicorn.quantization_noise(w, packed)
    return float(signal), float(noise)


def quantize_w4g32_reference(w: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """INT4, groups of 32, searched scale: value = s * q, q in -8..7, fp16 s of either sign.

    For each factor f and sign, q = clamp(rint(w * f / amax)) has the least-squares scale A / B with
    A = sum(w q), B = sum(q q), and squared error sum(w w) - A A / B: the largest A A / B wins (each sum with
    the importance of the columns). The scale is rounded to fp16 (clamped to its range) and q is taken once more,
    for that scale.
    """
    _check(w)
    n, k = w.shape
    x, amax = _normalised_groups(w)
    found, on_grid = _searched_scale(x, _column_weights(importance, w))
    scale = (found * amax).clamp(-MAX_SCALE, MAX_SCALE).half()  # [N, G]
    s = scale.float()
    step = torch.where(s == 0, torch.zeros_like(s), amax / s)
    q = torch.round(x * step[..., None]).clamp(-8, 7).to(torch.int8)
    if w.dtype == torch.bfloat16 and bool(on_grid.any()):
        scale = _scale_of_grid(w, q, scale, on_grid)
    packed, scales = pack_w4g32(q.view(n, -1)[:, :k], scale)
    return packed, scales


def _normalised_groups(w: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [N, K] -> fp32 [N, G, 32] within -1..1, and what it was divided by [N, G]."""
    x = torch.nn.functional.pad(w.float(), (0, -w.shape[1] % GROUP)).view(w.shape[0], -1, GROUP)
    amax = x.abs().amax(-1).clamp_min(MIN_AMAX)
    return x * (1.0 / amax)[..., None], amax


def _column_weights(importance: Tensor | None, w: Tensor) -> Tensor:
    """fp32 [G, 32]: ones, or `importance` with zeros up to the last group."""
    missing = -w.shape[1] % GROUP
    if importance is None:
        return torch.ones(w.shape[1] + missing).view(-1, GROUP)
    return torch.nn.functional.pad(importance, (0, missing)).view(-1, GROUP)


def _scale_of_grid(w: Tensor, q: Tensor, scale: Tensor, on_grid: Tensor) -> Tensor:
    """`scale`, or the nearest neighbour whose grid rounds to exactly the weights in bf16; where `on_grid`."""
    whole = torch.nn.functional.pad(w, (0, -w.shape[1] % GROUP)).view(q.shape)
    bits = scale.view(torch.int16)
    left = on_grid & ((bits & 0x7FFF) >= MIN_GRID_SCALE)
    result = bits.clone()
    for shift in (0, *NEIGHBOURS):
        values = ((bits + shift).view(torch.float16).float()[..., None] * q.float()).bfloat16()
        exact = left & (values == whole).all(-1)
        result, left = torch.where(exact, bits + shift, result), left & ~exact
    return result.view(torch.float16)


def _searched_scale(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Best least-squares scale [N, G] of x [N, G, 32], |x| <= 1, weighted with h [G, 32]; 0 where x is all zero.

    And where what is left of the squares is below GRID_ERROR of them.
    """
    best = torch.full(x.shape[:2], -1.0)
    scale = torch.zeros(x.shape[:2])
    for factor in FACTORS:
        r = torch.round(x * factor)
        for sign, q in ((1.0, r.clamp(-8, 7)), (-1.0, r.clamp(-7, 8))):  # sign -1: stored are -q and -A / B
            a, b = torch.zeros_like(best), torch.zeros_like(best)
            for i in range(GROUP):
                a = a + (x[..., i] * h[:, i]) * q[..., i]
                b = b + (q[..., i] * h[:, i]) * q[..., i]
            t = a / b.clamp_min(kquants.MIN_SUM)
            score = a * t
            better = score > best
            best = torch.where(better, score, best)
            scale = torch.where(better, sign * t, scale)
    squares = torch.zeros_like(best)
    for i in range(GROUP):
        squares = squares + (x[..., i] * h[:, i]) * x[..., i]
    return scale, squares - best <= squares * GRID_ERROR


def quantize_w4n32_reference(w: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """INT4 by codebook, groups of 32, searched scale: value = s * CODEBOOK[q], fp16 s of either sign.

    As w4g32, with the nearest entry of the codebook instead of the nearest integer.
    """
    _check(w)
    n, k = w.shape
    x, amax = _normalised_groups(w)
    h = _column_weights(importance, w)
    best, found = torch.full(x.shape[:2], -1.0), torch.zeros(x.shape[:2])
    table, thresholds = torch.tensor(CODEBOOK, dtype=torch.float32), torch.tensor(THRESHOLDS)
    for factor in CODEBOOK_FACTORS:
        for signed in (factor, -factor):
            v = table[torch.bucketize(x * signed, thresholds)]
            a, b = torch.zeros_like(best), torch.zeros_like(best)
            for i in range(GROUP):
                a = a + (x[..., i] * h[:, i]) * v[..., i]
                b = b + (v[..., i] * h[:, i]) * v[..., i]
            t = a / b
            better = a * t > best
            best = torch.where(better, a * t, best)
            found = torch.where(better, t, found)
    scale = (found * amax).clamp(-MAX_SCALE, MAX_SCALE).half()  # [N, G]
    s = scale.float()
    step = torch.where(s == 0, torch.zeros_like(s), amax / s)
    q = torch.bucketize(x * step[..., None], thresholds).to(torch.uint8)
    packed, scales, table = pack_w4n32(q.view(n, -1)[:, :k], scale)
    return packed, scales, table


def quantize_w8g32_reference(w: Tensor) -> tuple[Tensor, Tensor]:
    """INT8 symmetric, groups of 32: value = s * q, fp16 s = amax / 127, q in -127..127. GGUF's Q8_0 with q rounded
    for the stored scale."""
    _check(w)
    n, k = w.shape
    x = torch.nn.functional.pad(w.float(), (0, -k % GROUP)).view(n, -1, GROUP)
    scale = (x.abs().amax(-1) / 127.0).clamp_max(MAX_SCALE).half()
    s = scale.float()
    inverse = torch.where(s == 0, torch.zeros_like(s), 1.0 / s)
    q = torch.round(x * inverse[..., None]).clamp(-127, 127).to(torch.int8)
    packed, scales = pack_w8g32(q.view(n, -1)[:, :k], scale)
    return packed, scales


def quantize_w8c_reference(w: Tensor) -> tuple[Tensor, Tensor]:
    """INT8 symmetric per row: value = s * (byte - 128), s = amax / 127, byte in 1..255."""
    _check(w)
    x = w.float()
    amax = x.abs().amax(1)
    live = amax >= MIN_AMAX
    inverse = torch.where(live, (1.0 / amax) * 127.0, torch.zeros_like(amax))
    scale = torch.where(live, amax / 127.0, torch.zeros_like(amax))
    q = torch.round(x * inverse[:, None]).clamp(-127, 127) + W8_ZERO
    packed, scales = pack_w8(q.to(torch.uint8), scale)
    return packed, scales


def quantize_w8a_reference(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """INT8 asymmetric per row: value = s * (byte - z). 0 is always a value, so z is a byte too."""
    _check(w)
    x = w.float()
    low, high = x.amin(1).clamp_max(0.0), x.amax(1).clamp_min(0.0)
    scale = high / 255.0 - low / 255.0  # each part first: the range itself may overflow
    live = scale >= MIN_AMAX
    inverse = torch.where(live, 1.0 / scale, torch.zeros_like(scale))
    scale = torch.where(live, scale, torch.zeros_like(scale))
    zero = torch.where(live, torch.round(-low * inverse).clamp(0, 255), torch.full_like(scale, float(W8_ZERO)))
    q = (torch.round(x * inverse[:, None]) + zero[:, None]).clamp(0, 255)
    packed, scales, zeros = pack_w8(q.to(torch.uint8), scale, zero.to(torch.uint8))
    return packed, scales, zeros


def count_nonfinite_reference(w: Tensor) -> int:
    """How many elements of `w` are NaN or Inf."""
    return int(w.numel() - torch.isfinite(w).sum().item())


def quantization_noise_reference(w: Tensor, packed: list[Tensor]) -> tuple[float, float]:
    """Sums of squares of `w` and of its difference to the packed weight."""
    x = w.double()
    noise = x - dequantize(packed, w.shape[0], w.shape[1]).double()
    return float(x.square().sum()), float(noise.square().sum())


def _check(w: Tensor) -> None:
    torch._check(
        w.dim() == 2 and w.dtype in (torch.bfloat16, torch.float16, torch.float32),
        lambda: f"quantize: expected a bf16, fp16 or fp32 matrix, got {w.dtype} {list(w.shape)}",
    )
    if bad := count_nonfinite_reference(w):
        raise ValueError(f"quantize: {bad} of {w.numel()} elements are NaN or Inf")


def _checked(quantizer: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    @functools.wraps(quantizer)
    def checked(w: Tensor, importance: Tensor | None = None) -> tuple[Tensor, ...]:
        _check(w)
        return quantizer(w, importance)

    return checked


def _fake(scheme: str) -> Callable[..., tuple[Tensor, ...]]:
    def fake(w: Tensor, importance: Tensor | None = None) -> tuple[Tensor, ...]:
        return tuple(empty_packed(w.shape[0], w.shape[1], scheme, w.device))

    return fake


for _scheme in SCHEMES:
    torch.library.register_fake(f"unicorn::quantize_{_scheme}", _fake(_scheme))
# Where the native library is there, its CPU kernels come before these.
REFERENCES: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "w4g32": quantize_w4g32_reference,
    "w4n32": quantize_w4n32_reference,
    "w4m32": _checked(kquants.quantize_w4m32),
    "q4k": _checked(kquants.quantize_q4k),
    "q5k": _checked(kquants.quantize_q5k),
    "q6k": _checked(kquants.quantize_q6k),
    "w8c": quantize_w8c_reference,
    "w8a": quantize_w8a_reference,
    "w8g32": quantize_w8g32_reference,
}
for _scheme, _function in REFERENCES.items():
    LIBRARY.impl(f"quantize_{_scheme}", _function, "CompositeExplicitAutograd")
LIBRARY.impl("quantization_noise", quantization_noise_reference, "CompositeExplicitAutograd")
LIBRARY.impl("count_nonfinite", count_nonfinite_reference, "CompositeExplicitAutograd")
