"""Dataflow of `gemm_i8` over the whole array: a along the rows, b down the columns, c joined per column.

                     shim ── a row 0 ──> memory tile ──> every core of row 0            (broadcast)
    column c:        shim ── b column c > memory tile ──> every core of column c        (broadcast)
    core (r, c):     c tile += a tile (r, step) b tile (step, c), `steps` times
    column c:        four c tiles ──> memory tile, joined ──> shim

Every transfer is linear: the host has tiled everything (`unicorn_backend/runtime/npu/pack.py`).
"""

import numpy as np
from aie.helpers.taplib import TensorAccessPattern
from aie.iron import Kernel, ObjectFifo, Program, Runtime, Worker
from aie.iron.controlflow import range_
from aie.iron.device import NPU1, NPU2, Tile
from aie.iron.placers import SequentialPlacer

DEVICES = {"npu1": NPU1, "npu2": NPU2}


def program(design, binary):
    """The MLIR module of `design` (a `designs.Gemm`); `binary`: object file of the kernels."""
    g = design.generation
    m, k, n = design.tile_m, design.tile_k, design.tile_n
    a_type, b_type, c_type = _array(m * k, np.int8), _array(k * n, np.int8), _array(m * n, np.int32)
    zero = Kernel("unicorn_gemm_i8_zero", binary, [c_type])
    multiply = Kernel("unicorn_gemm_i8", binary, [a_type, b_type, c_type])

    # With twice as many columns as rows, a comes in through every other column.
    a_columns = [row * g.columns // g.rows for row in range(g.rows)]
    a_in = [ObjectFifo(a_type, name=f"a_in_{row}", depth=2) for row in range(g.rows)]
    a_rows = [
        fifo.cons().forward(obj_type=a_type, name=f"a_{row}", placement=Tile(a_columns[row], 1))
        for row, fifo in enumerate(a_in)
    ]
    b_in = [ObjectFifo(b_type, name=f"b_in_{column}", depth=2) for column in range(g.columns)]
    b_columns = [
        fifo.cons().forward(obj_type=b_type, name=f"b_{column}", placement=Tile(column, 1))
        for column, fifo in enumerate(b_in)
    ]
    c_out = [
        ObjectFifo(_array(g.rows * m * n, np.int32), name=f"c_out_{column}", depth=2) for column in range(g.columns)
    ]
    c_parts = [
        fifo.prod().join(
            [row * m * n for row in range(g.rows)],
            obj_types=[c_type] * g.rows,
            names=[f"c_{row}_{column}" for row in range(g.rows)],
            depths=[2] * g.rows,
            placement=Tile(column, 1),
        )
        for column, fifo in enumerate(c_out)
    ]

    def core(a_fifo, b_fifo, c_fifo, zero, multiply):
        c = c_fifo.acquire(1)
        zero(c)
        for _ in range_(design.steps):
            a, b = a_fifo.acquire(1), b_fifo.acquire(1)
            multiply(a, b, c)
            a_fifo.release(1)
            b_fifo.release(1)
        c_fifo.release(1)

    workers = [
        Worker(
            core,
            [a_rows[row].cons(), b_columns[column].cons(), c_parts[column][row].prod(), zero, multiply],
            placement=Tile(column, 2 + row),
        )
        for row in range(g.rows)
        for column in range(g.columns)
    ]

    a_bytes, b_bytes, c_words = design.buffer_bytes[0], design.buffer_bytes[1], design.buffer_bytes[2] // 4
    a_part, b_part, c_part = a_bytes // g.rows, b_bytes // g.columns, c_words // g.columns
    runtime = Runtime()
    with runtime.sequence(_array(a_bytes, np.int8), _array(b_bytes, np.int8), _array(c_words, np.int32)) as (a, b, c):
        runtime.start(*workers)
        for row in range(g.rows):  # once per round of b
            tap = TensorAccessPattern((a_bytes,), row * a_part, [design.rounds, 1, 1, a_part], [0, 0, 0, 1])
            runtime.fill(a_in[row].prod(), a, tap, placement=Tile(a_columns[row], 0))
        for column in range(g.columns):
            tap = TensorAccessPattern((b_bytes,), column * b_part, [1, 1, 1, b_part], [0, 0, 0, 1])
            runtime.fill(b_in[column].prod(), b, tap, placement=Tile(column, 0))
        for column in range(g.columns):
            tap = TensorAccessPattern((c_words,), column * c_part, [1, 1, 1, c_part], [0, 0, 0, 1])
            runtime.drain(c_out[column].cons(), c, tap, wait=True, placement=Tile(column, 0))
    return Program(DEVICES[design.target](), runtime).resolve_program(SequentialPlacer())


def _array(size, dtype):
    return np.ndarray[(size,), np.dtype[dtype]]
