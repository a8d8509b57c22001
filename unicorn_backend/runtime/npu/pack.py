"""Matrices <-> the bytes that a launch reads and writes. The tiles are those of `kernels/aie/*.cc`.

The host puts everything into the order in which the cores take it, so that every DMA transfer is linear: no
descriptor has to reorder anything, and what cannot be verified without hardware stays small.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from unicorn_backend.runtime.npu.arithmetic import Keys, Rows, State
from unicorn_backend.runtime.npu.designs import Attention, Gemm

Bytes = NDArray[np.uint8]


def pad(x: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """x with zeros behind it along every dimension, up to `shape`."""
    if x.shape == shape:
        return x
    padded = np.zeros(shape, x.dtype)
    padded[tuple(slice(0, size) for size in x.shape)] = x
    return padded


def gemm_a(design: Gemm, a: NDArray[np.int8]) -> Bytes:
    """int8 [M <= tokens, K <= k] -> [rows][steps][tile_m / R][tile_k / 8][R][8]."""
    r = design.generation.product_rows
    x = pad(a, (design.tokens, design.k))
    x = x.reshape(design.generation.rows, design.tile_m // r, r, design.steps, design.tile_k // 8, 8)
    return _bytes(x.transpose(0, 3, 1, 4, 2, 5))


def gemm_b(design: Gemm, b: NDArray[np.int8]) -> Bytes:
    """int8 weight [N <= n, K <= k] -> [columns][rounds][steps][tile_k / 8][tile_n / 8][8 k][8 n].

    Tile t of n, counted from 0, belongs to column t % columns, round t // columns.
    """
    x = pad(b, (design.n, design.k))
    x = x.reshape(design.rounds, design.generation.columns, design.tile_n // 8, 8, design.steps, design.tile_k // 8, 8)
    return _bytes(x.transpose(1, 0, 4, 5, 2, 6, 3))


def gemm_c(design: Gemm, raw: Bytes) -> NDArray[np.int32]:
    """[columns][rounds][rows][tile_m / R][tile_n / 8][R][8] int32 -> [tokens, n]."""
    r, g = design.generation.product_rows, design.generation
    x = raw.view(np.int32).reshape(g.columns, design.rounds, g.rows, design.tile_m // r, design.tile_n // 8, r, 8)
    return x.transpose(2, 3, 5, 1, 0, 4, 6).reshape(design.tokens, design.n)


def query_blocks(design: Attention, rows: Rows) -> Bytes:
    """Up to `query_rows` rows -> [cores, query_bytes]; the rows behind them see no key."""
    r, cores, n = design.generation.product_rows, design.cores, design.query_rows
    out = np.zeros((cores, design.query_bytes), np.uint8)
    q = pad(rows.q, (n, design.head_dim)).reshape(cores, design.rows // r, r, design.head_dim // 8, 8)
    at = design.rows * design.head_dim
    out[:, :at] = _bytes(q.transpose(0, 1, 3, 2, 4)).reshape(cores, at)
    for values, kind in ((rows.mult, np.int16), (rows.first, np.int32), (rows.last, np.int32)):
        packed = _bytes(pad(values.astype(kind), (n,))).reshape(cores, -1)
        out[:, at : at + packed.shape[1]] = packed
        at += packed.shape[1]
    out[:, at : at + 4] = np.array([rows.shift], np.int32).view(np.uint8)
    return out.reshape(-1)


def key_blocks(design: Attention, keys: Keys) -> Bytes:
    """Keys padded to whole launches -> [blocks of all launches, keys_bytes]."""
    if keys.block != design.keys:
        raise ValueError(f"keys in blocks of {keys.block} for a design with blocks of {design.keys}")
    count = -(-len(keys.k) // design.key_range) * design.blocks
    shape = (count * design.keys, design.head_dim)
    size = design.keys * design.head_dim
    k, v = (pad(x, shape).reshape(count, design.keys // 8, 8, -1, 8) for x in (keys.k, keys.v))
    out = np.zeros((count, design.keys_bytes), np.uint8)
    out[:, :size] = _bytes(k.transpose(0, 1, 3, 4, 2)).reshape(count, size)
    out[:, size : 2 * size] = _bytes(v.transpose(0, 1, 3, 2, 4)).reshape(count, size)
    header = np.zeros((count, 16), np.int32)
    header[:, 0] = np.arange(count) * design.keys
    header[: len(keys.finer), 1] = keys.finer
    out[:, 2 * size :] = header.view(np.uint8)
    return out.reshape(-1)


def states(design: Attention, raw: Bytes) -> State:
    """[cores, state_words] int32 -> m, l [query_rows], O [query_rows, D]."""
    r, cores = design.generation.product_rows, design.cores
    words = raw.view(np.int32).reshape(cores, design.state_words)
    o = words[:, 2 * design.rows :].reshape(cores, design.rows // r, design.head_dim // 8, r, 8)
    return State(
        words[:, : design.rows].reshape(-1).astype(np.int64),
        words[:, design.rows : 2 * design.rows].reshape(-1).astype(np.int64),
        o.transpose(0, 1, 3, 2, 4).reshape(design.query_rows, design.head_dim).astype(np.int64),
    )


def _bytes(x: NDArray[Any]) -> Bytes:
    return np.ascontiguousarray(x).view(np.uint8).reshape(-1)
