"""The integer arithmetic of the NPU kernels in plain NumPy: what a core must compute, bit for bit.

Written from the definition at the head of `kernels/aie/attention_i8.cc`, on int64 and without tiles. It is the
oracle of the tests and of the self-test before a kernel serves, and the same attention on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

MASKED = -(1 << 28)
LIMIT = 1 << 27
FAR = 4095


def round_shift(v: Array, shift: int) -> Array:
    """v / 2^shift, half to even."""
    if shift == 0:
        return v
    whole: Array = v >> shift
    rest, half = v - (whole << shift), 1 << (shift - 1)
    up: Array = (rest > half) | ((rest == half) & ((whole & 1) == 1))
    result: Array = whole + up
    return result


def exp2_neg(t: Array) -> Array:
    """2^-(t / 256) in Q15 for t in 0..4095."""
    fraction, whole = t & 255, t >> 8
    p = _horner(32767, fraction, _horner(-22670, fraction, _horner(7607, fraction, np.full_like(t, -1325))))
    shifted: Array = p >> whole
    return shifted


def _horner(c: int, f: Array, x: Array) -> Array:
    return np.clip(round_shift((c << 8) + f * x, 8), -32768, 32767)


def gemm(a: NDArray[np.int8], b: NDArray[np.int8]) -> NDArray[np.int32]:
    """[M, K] int8 times [K, N] int8, exact. Through float64, which holds every such sum."""
    return (a.astype(np.float64) @ b.astype(np.float64)).astype(np.int64).astype(np.int32)


@dataclass
class Rows:
    """Query rows of one head: int8 values, and what turns an integer product into a logit in Q8 log2 units."""

    q: NDArray[np.int8]  # [R, D]
    mult: NDArray[np.int16]  # [R]
    first: NDArray[np.int32]  # [R] first key that the row sees
    last: NDArray[np.int32]  # [R] one past the last
    shift: int

    def part(self, rows: slice) -> Rows:
        return Rows(self.q[rows], self.mult[rows], self.first[rows], self.last[rows], self.shift)

    def roll(self, by: int) -> Rows:
        """The same rows, `by` places further."""
        mult, first, last = np.roll(self.mult, by), np.roll(self.first, by), np.roll(self.last, by)
        return Rows(np.roll(self.q, by, 0), mult, first, last, self.shift)


@dataclass
class Keys:
    """Keys and values of one head, padded to whole blocks; `finer` [blocks]: see `attention_i8.cc`."""

    k: NDArray[np.int8]  # [S, D]
    v: NDArray[np.int8]  # [S, D]
    finer: NDArray[np.int32]
    block: int
    packed: NDArray[np.uint8] | None = None  # the same as a launch reads it, once it was needed


@dataclass
class State:
    """Sums over the keys seen so far: O / l is the attention output in units of v's scale."""

    m: Array  # [R]
    l: Array  # noqa: E741  [R], the name in the literature
    o: Array  # [R, D]


def start(rows: int, dim: int) -> State:
    return State(np.full(rows, MASKED, np.int64), np.zeros(rows, np.int64), np.zeros((rows, dim), np.int64))


def attend(rows: Rows, keys: Keys, begin: int = 0, end: int | None = None) -> State:
    """Flash attention of `rows` over the blocks of keys [begin, end), starting from nothing."""
    state = start(*rows.q.shape)
    blocks = range(begin // keys.block, (len(keys.k) if end is None else end) // keys.block)
    for block in blocks:
        base = block * keys.block
        live = (rows.first < base + keys.block) & (rows.last > base) & (rows.first < rows.last)
        if live.any():
            _add_block(rows, keys, base, int(keys.finer[block]), live, state)
    return state


def _add_block(rows: Rows, keys: Keys, base: int, finer: int, live: Array, state: State) -> None:
    part = slice(base, base + keys.block)
    q, k, v = (x.astype(np.float64) for x in (rows.q[live], keys.k[part], keys.v[part]))
    product = (q @ k.T).astype(np.int64) * rows.mult[live, None].astype(np.int64)
    t = np.clip(np.clip(round_shift(product, rows.shift + finer), -(2**31), 2**31 - 1), -LIMIT, LIMIT)
    column = base + np.arange(keys.block)
    t = np.where((column < rows.first[live, None]) | (column >= rows.last[live, None]), MASKED, t)
    before = state.m[live]
    now = np.maximum(before, t.max(1))
    power = exp2_neg(np.minimum(now - before, FAR))
    factor = power - (power >> 1)
    below = np.minimum(np.maximum(now, -LIMIT)[:, None] - t, FAR)
    p = round_shift(exp2_neg(below) * 255, 15)
    state.m[live] = now
    state.l[live] = ((state.l[live] * factor + (1 << 13)) >> 14) + p.sum(1)
    state.o[live] = round_shift(state.o[live] * factor[:, None], 14) + (p.astype(np.float64) @ v).astype(np.int64)
