"""The kernels' own source, compiled against the host model, bit for bit against NumPy without tiles."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests.npu.conftest import Launch
from unicorn_backend.runtime.npu import arithmetic, pack
from unicorn_backend.runtime.npu.arithmetic import Keys, Rows
from unicorn_backend.runtime.npu.designs import Attention, Gemm

TARGETS = ("npu1", "npu2")
VALUES = ("random", "extreme", "constant", "zero")
RANGES = ("all", "causal", "window", "padding", "holes", "random")


def int8(rng: np.random.Generator, kind: str, *shape: int) -> np.ndarray:
    if kind == "random":
        return rng.integers(-127, 128, shape).astype(np.int8)
    if kind == "extreme":
        return rng.choice(np.array([-128, 127], np.int8), shape)
    return np.full(shape, -128 if kind == "constant" else 0, np.int8)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("values", VALUES)
def test_gemm(launch: Launch, target: str, values: str) -> None:
    rng = np.random.default_rng(1)
    tiles = ((32, 128, 64), (16, 64, 32), (48, 32, 16), (64, 32, 96))
    for (m, k, n), steps, rounds in zip(tiles, (3, 1, 5, 2), (1, 3, 2, 1), strict=True):
        columns = 4 if target == "npu1" else 8
        design = Gemm(target, k * steps, n * columns * rounds, m, k, n)
        a = int8(rng, values, design.tokens - 3, design.k)
        b = int8(rng, "extreme" if values == "constant" else values, design.n - 5, design.k)
        raw = launch(design, [pack.gemm_a(design, a), pack.gemm_b(design, b)])
        got = pack.gemm_c(design, raw)
        want = a.astype(np.int64) @ b.astype(np.int64).T
        assert (got[: len(a), : len(b)] == want).all()
        assert (got[len(a) :] == 0).all() and (got[:, len(b) :] == 0).all()


def key_ranges(rng: np.random.Generator, kind: str, rows: int, keys: int) -> tuple[np.ndarray, np.ndarray]:
    """first, last of each row."""
    at = np.arange(rows) * keys // rows
    zero = np.zeros(rows, np.int64)
    if kind == "causal":
        return zero, at + 1
    if kind == "window":
        return np.maximum(at - 40, 0), at + 1
    if kind == "padding":
        return zero + keys // 3, np.maximum(at + 1, keys // 3)
    if kind == "holes":  # every other row sees nothing, and two see one key each
        return at, np.where(np.arange(rows) % 2, at, at + 1)
    if kind == "random":
        return np.sort(rng.integers(-9, keys + 9, (2, rows)), axis=0)[0], rng.integers(-9, keys + 9, rows)
    return zero, zero + keys


def case(
    rng: np.random.Generator, design: Attention, ranges: str, values: str, rows: int, keys: int
) -> tuple[Rows, Keys]:
    d = design.head_dim
    first, last = key_ranges(rng, ranges, rows, keys)
    shift = int(rng.choice([0, 3, 9, 14, 22, 30]))
    largest = {"random": 2 ** min(shift + 2, 15) - 1, "extreme": 32767, "constant": 1, "zero": 32767}[values]
    mult = rng.integers(-1 if values == "extreme" else 0, largest + 1, rows)
    if values == "extreme":
        mult = rng.choice([-32768, -1, 0, 1, 32767], rows)
    query = Rows(
        int8(rng, values, rows, d), mult.astype(np.int16), first.astype(np.int32), last.astype(np.int32), shift
    )
    padded = -(-keys // design.key_range) * design.key_range
    finer = rng.integers(0, 8, padded // design.keys).astype(np.int32)
    k, v = (pack.pad(int8(rng, values, keys, d), (padded, d)) for _ in range(2))
    return query, Keys(k, v, finer, design.keys)


def run(launch: Launch, design: Attention, rows: Rows, keys: Keys, part: int) -> arithmetic.State:
    blocks = pack.key_blocks(design, keys).reshape(-1, design.blocks * design.keys_bytes)
    return pack.states(design, launch(design, [pack.query_blocks(design, rows), blocks[part]]))


def assert_same(got: arithmetic.State, want: arithmetic.State, rows: int) -> None:
    for name in "mlo":
        x, y = getattr(got, name)[:rows], getattr(want, name)
        assert (x == y).all(), f"{name} differs in {int((x != y).sum())} places"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("head_dim", (64, 128, 256))
@pytest.mark.parametrize("values", VALUES)
def test_attention(launch: Launch, target: str, head_dim: int, values: str) -> None:
    tiles = {64: (32, 64, 3), 128: (32, 32, 4), 256: (16, 32, 5)}
    rows, keys, blocks = tiles[head_dim]
    design = Attention(target, head_dim, rows, keys, blocks)
    rng = np.random.default_rng(head_dim)
    for ranges, lengths in itertools.product(RANGES, ((200, 150), (7, 33), (design.query_rows, design.key_range))):
        query, key = case(rng, design, ranges, values, min(lengths[0], design.query_rows), lengths[1])
        for part in range(len(key.k) // design.key_range):
            begin = part * design.key_range
            want = arithmetic.attend(query, key, begin, begin + design.key_range)
            assert_same(run(launch, design, query, key, part), want, len(query.q))


@pytest.mark.parametrize("target", TARGETS)
def test_a_row_does_not_depend_on_its_neighbours(launch: Launch, target: str) -> None:
    """Same rows in another order, on other cores: same bits; so the number of rows per core does not matter."""
    rng = np.random.default_rng(3)
    design = Attention(target, 64, 16, 32, 4)
    rows, keys = case(rng, design, "random", "random", design.query_rows, design.key_range)
    order = rng.permutation(design.query_rows)
    mixed = Rows(rows.q[order], rows.mult[order], rows.first[order], rows.last[order], rows.shift)
    straight, shuffled = run(launch, design, rows, keys, 0), run(launch, design, mixed, keys, 0)
    for name in "mlo":
        assert (getattr(straight, name)[order] == getattr(shuffled, name)).all()


def test_largest_sums_fit() -> None:
    """The limits of `designs.py`: 65,536 keys at weight 255 and value -127 stay inside int32."""
    from unicorn_backend.runtime.npu.designs import MAX_K, MAX_KEYS

    assert 255 * 127 * MAX_KEYS < 2**31 and 127 * 127 * MAX_K < 2**31


def test_exp2() -> None:
    """The error that `attention_i8.cc` states, and that the largest weight is 255 and the smallest 0."""
    t = np.arange(4096)
    value = arithmetic.exp2_neg(t)
    assert np.abs(value / 32767 - 2.0 ** (-t / 256)).max() < 0.0003
    assert value[0] == 32767 and value[4095] == 0
