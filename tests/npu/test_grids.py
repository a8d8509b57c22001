"""Both kernels' own source against a second reference: sizes, windows and values that nothing else here uses.

The reference is written from the definition at the head of `kernels/aie/attention_i8.cc` alone, row by row, with exact
fractions where the kernel rounds; it shares no line with `unicorn_backend/runtime/npu/arithmetic.py`.
"""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.npu.conftest import Launch
from unicorn_backend.runtime.npu import arithmetic, pack
from unicorn_backend.runtime.npu.arithmetic import Keys, Rows
from unicorn_backend.runtime.npu.designs import MAX_K, Attention, Gemm

Ints = NDArray[np.int64]
MASKED, LIMIT = -(2**28), 2**27


def exp2(t: int) -> int:
    """2^-(t / 256) in Q15: cubic in t mod 256 by Horner, each step rounded half to even into int16."""
    x = -1325
    for c in (7607, -22670, 32767):
        x = min(max(round(Fraction(c * 256 + (t % 256) * x, 256)), -(2**15)), 2**15 - 1)
    return x // 2 ** (t // 256)


EXP2 = np.array([exp2(t) for t in range(4096)], np.int64)


def srs(v: Ints, shift: int) -> Ints:
    """v / 2^shift, half to even, saturated to int32."""
    if shift:
        quotient, rest = np.divmod(v, 2**shift)
        v = quotient + ((2 * rest > 2**shift) | ((2 * rest == 2**shift) & (quotient % 2 == 1)))
    return np.clip(v, -(2**31), 2**31 - 1)


def attend_row(q: Ints, mult: int, first: int, last: int, shift: int, keys: Keys, begin: int) -> tuple[int, int, Ints]:
    """m, l, O of one row over the keys from `begin` to the end of a launch."""
    m, total, out = MASKED, 0, np.zeros(keys.v.shape[1], np.int64)
    for at in range(0, len(keys.k), keys.block):
        base = begin + at
        seen = [s for s in range(keys.block) if first <= base + s < last]
        if not seen:
            continue
        k, v = (x[at : at + keys.block].astype(np.int64) for x in (keys.k, keys.v))
        t = np.full(keys.block, MASKED, np.int64)
        t[seen] = np.clip(srs((k @ q) * mult, shift + int(keys.finer[at // keys.block])), -LIMIT, LIMIT)[seen]
        now = max(m, int(t.max()))
        power = EXP2[min(now - m, 4095)]
        a = int(power) - int(power) // 2
        p = srs(255 * EXP2[np.minimum(now - t, 4095)], 15)
        total = (total * a + 2**13) // 2**14 + int(p.sum())
        out, m = srs(out * a, 14) + p @ v, now
    return m, total, out


def windows(rng: np.random.Generator, rows: int, design: Attention, begin: int) -> tuple[Ints, Ints]:
    """first, last: every kind of edge there is, around the block boundaries of the launch."""
    edges = begin + np.arange(0, design.key_range + 1, design.keys)
    near = (edges[:, None] + np.array([-1, 0, 1])).reshape(-1)
    first, last = rng.choice(near, rows), rng.choice(near, rows)
    far = 2**31 - 1
    fixed = [(-far - 1, far), (far, -far - 1), (begin, begin), (begin + 1, begin), (-1, begin + 1), (0, 0)]
    fixed += [
        (begin + design.key_range - 1, far),
        (begin + design.key_range, far),
        (-far - 1, begin),
        (begin, begin + 1),
    ]
    first[: len(fixed)], last[: len(fixed)] = np.array(fixed).T
    return first, last


def values(rng: np.random.Generator, kind: str, rows: int, keys: int, dim: int) -> tuple[Ints, Ints, Ints, Ints]:
    """q, k, v, mult."""
    mult = rng.choice([0, 1, 2, 255, 4095, 32767], rows)
    sign = rng.choice([-1, 1], dim)
    if kind == "rising":  # the largest logit is in the last block: O is scaled down in each
        k = np.clip(sign * (np.arange(keys)[:, None] * 127 // keys), -128, 127)
        return np.tile(sign * 127, (rows, 1)), k, rng.integers(-128, 128, (keys, dim)), mult
    if kind == "falling":
        k = np.clip(sign * ((keys - np.arange(keys))[:, None] * 127 // keys), -128, 127)
        return np.tile(sign * 127, (rows, 1)), k, np.full((keys, dim), -128), mult
    if kind == "one hot":
        q, k = np.zeros((rows, dim), np.int64), np.zeros((keys, dim), np.int64)
        q[np.arange(rows), np.arange(rows) % dim] = rng.choice([-128, 127], rows)
        k[np.arange(keys), np.arange(keys) % dim] = rng.choice([-128, 127], keys)
        return q, k, rng.choice([-128, 0, 127], (keys, dim)), mult
    q, k, v = (rng.choice([-128, -127, -1, 0, 1, 127], (n, dim)) for n in (rows, keys, keys))
    return q, k, v, rng.choice([-32768, -32767, -1, 0, 32767], rows)


DESIGNS = [
    Attention("npu1", 96, 16, 48, 3),
    Attention("npu1", 192, 16, 16, 4),
    Attention("npu1", 64, 48, 80, 2),
    Attention("npu1", 256, 16, 32, 2),
    Attention("npu2", 96, 32, 16, 5),
    Attention("npu2", 192, 16, 48, 2),
    Attention("npu2", 64, 16, 112, 1),
    Attention("npu2", 128, 16, 64, 3),
]


@pytest.mark.parametrize("design", DESIGNS, ids=lambda d: f"{d.target}-{d.head_dim}-{d.rows}-{d.keys}")
@pytest.mark.parametrize("kind", ["rising", "falling", "one hot", "edges"])
def test_attention(launch: Launch, design: Attention, kind: str) -> None:
    rng = np.random.default_rng(design.head_dim + design.keys)
    for begin, shift in ((0, 0), (design.key_range, 5), (7 * design.key_range, 17), (design.key_range, 40)):
        count = 40
        q, k, v, mult = values(rng, kind, count, design.key_range, design.head_dim)
        first, last = windows(rng, count, design, begin)
        rows = Rows(
            *(x.astype(t) for x, t in ((q, np.int8), (mult, np.int16), (first, np.int32), (last, np.int32))), shift
        )
        finer = rng.integers(0, 9, design.blocks).astype(np.int32)
        keys = Keys(k.astype(np.int8), v.astype(np.int8), finer, design.keys)
        packed = pack.key_blocks(design, keys).reshape(design.blocks, -1)
        packed[:, -64:-60] = (begin + np.arange(design.blocks, dtype=np.int32) * design.keys)[:, None].view(np.uint8)
        got = pack.states(design, launch(design, [pack.query_blocks(design, rows), packed.reshape(-1)]))
        for row in range(count):
            m, total, out = attend_row(q[row], int(mult[row]), int(first[row]), int(last[row]), shift, keys, begin)
            at = f"row {row}, keys {first[row]} to {last[row]} of {begin} on, shift {shift}, mult {mult[row]}"
            assert (got.m[row], got.l[row]) == (m, total), at
            assert (got.o[row] == out).all(), at


@pytest.mark.parametrize("target", ["npu1", "npu2"])
def test_every_distance_from_the_largest_logit(launch: Launch, target: str) -> None:
    """t in 0 .. 4400 below the maximum, one key each: all values of exp2, and what lies beyond them."""
    design = Attention(target, 64, 16, 64, 4)
    for low in range(0, 4400, design.key_range - 1):
        below = np.arange(low, low + design.key_range - 1)
        q, k = np.zeros((1, 64), np.int64), np.zeros((design.key_range, 64), np.int64)
        q[0, :36], q[0, 36] = 127, 1
        k[1:, :35] = -(
            np.minimum(below[:, None] // 127, 127 * np.arange(1, 36))
            - np.minimum(below[:, None] // 127, 127 * np.arange(35))
        )
        k[1:, 36] = -(below % 127)
        assert ((k @ q[0])[1:] == -below).all()
        v = np.random.default_rng(low).integers(-128, 128, (design.key_range, 64))
        one, all_ = np.ones(1, np.int64), np.full(1, design.key_range)
        rows = Rows(q.astype(np.int8), one.astype(np.int16), np.zeros(1, np.int32), all_.astype(np.int32), 0)
        keys = Keys(k.astype(np.int8), v.astype(np.int8), np.zeros(design.blocks, np.int32), design.keys)
        raw = launch(design, [pack.query_blocks(design, rows), pack.key_blocks(design, keys)])
        got = pack.states(design, raw)
        m, total, out = attend_row(q[0], 1, 0, design.key_range, 0, keys, 0)
        assert (got.m[0], got.l[0]) == (m, total) and (got.o[0] == out).all()
    assert (EXP2 == arithmetic.exp2_neg(np.arange(4096))).all()


GEMMS = [
    (Gemm("npu1", 96, 320, 8, 32, 80), (127, -128)),
    (Gemm("npu1", 2560, 192, 24, 256, 48), (-128, -128)),
    (Gemm("npu1", MAX_K, 64, 8, 256, 16), (127, -128)),
    (Gemm("npu2", 576, 896, 16, 64, 112), (-128, 127)),
    (Gemm("npu2", 256, 256, 48, 128, 32), (-128, -128)),
]


@pytest.mark.parametrize(
    ("design", "ends"), GEMMS, ids=lambda x: f"{x.target}-{x.k}-{x.n}" if isinstance(x, Gemm) else ""
)
def test_gemm(launch: Launch, design: Gemm, ends: tuple[int, int]) -> None:
    """Sums at the end of their range beside random ones; launches that are full and ones that are not."""
    rng = np.random.default_rng(design.k)
    for rows, columns in itertools.product((1, design.tokens), (design.n - 1, design.n)):
        a, b = rng.integers(-128, 128, (rows, design.k)), rng.integers(-128, 128, (columns, design.k))
        a[:: max(rows // 3, 1)], b[::5] = ends
        want = a @ b.T
        assert np.abs(want).max() == abs(ends[0] * ends[1]) * design.k < 2**31
        raw = launch(design, [pack.gemm_a(design, a.astype(np.int8)), pack.gemm_b(design, b.astype(np.int8))])
        got = pack.gemm_c(design, raw)
        assert (got[:rows, :columns] == want).all() and not got[rows:].any() and not got[:, columns:].any()
