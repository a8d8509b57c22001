"""Dataflow of `attention_i8` over the whole array: every core its query rows, all cores the same keys.

    column c:   shim ── four query blocks ──> memory tile, split ──> one per core
                shim ── key blocks ─────────> memory tile ─────────> every core of the column (broadcast)
    core:       state = start; for each of `blocks` key blocks: state = attention_i8(query, keys, state)
    column c:   four states ──> memory tile, joined ──> shim

Every column reads the keys for itself: `columns` times the traffic of one broadcast over the array, but no route
crosses a column. A memory tile has all of its six channels each way in use.
"""

import numpy as np
from aie.helpers.taplib import TensorAccessPattern
from aie.iron import Kernel, ObjectFifo, Program, Runtime, Worker
from aie.iron.controlflow import range_
from aie.iron.device import NPU1, NPU2, Tile
from aie.iron.placers import SequentialPlacer

DEVICES = {"npu1": NPU1, "npu2": NPU2}


def program(design, binary):
    """The MLIR module of `design` (a `designs.Attention`); `binary`: object file of the kernels."""
    g = design.generation
    query_type, keys_type = _array(design.query_bytes, np.int8), _array(design.keys_bytes, np.int8)
    state_type = _array(design.state_words, np.int32)
    init = Kernel("unicorn_attention_i8_init", binary, [state_type])
    attend = Kernel("unicorn_attention_i8", binary, [query_type, keys_type, state_type])

    def columns(make):
        return [make(column) for column in range(g.columns)]

    rows = range(g.rows)
    query_in = columns(lambda c: ObjectFifo(_array(g.rows * design.query_bytes, np.int8), name=f"q_in_{c}", depth=1))
    queries = columns(
        lambda c: (
            query_in[c]
            .cons()
            .split(
                [row * design.query_bytes for row in rows],
                depths=[1] * g.rows,
                obj_types=[query_type] * g.rows,
                names=[f"q_{row}_{c}" for row in rows],
                placement=Tile(c, 1),
            )
        )
    )
    keys_in = columns(lambda c: ObjectFifo(keys_type, name=f"k_in_{c}", depth=2))
    keys = columns(lambda c: keys_in[c].cons().forward(obj_type=keys_type, name=f"k_{c}", placement=Tile(c, 1)))
    state_out = columns(lambda c: ObjectFifo(_array(g.rows * design.state_words, np.int32), name=f"o_out_{c}", depth=1))
    states = columns(
        lambda c: (
            state_out[c]
            .prod()
            .join(
                [row * design.state_words for row in rows],
                depths=[1] * g.rows,
                obj_types=[state_type] * g.rows,
                names=[f"o_{row}_{c}" for row in rows],
                placement=Tile(c, 1),
            )
        )
    )

    def core(query_fifo, keys_fifo, state_fifo, init, attend):
        query, state = query_fifo.acquire(1), state_fifo.acquire(1)
        init(state)
        for _ in range_(design.blocks):
            block = keys_fifo.acquire(1)
            attend(query, block, state)
            keys_fifo.release(1)
        query_fifo.release(1)
        state_fifo.release(1)

    workers = [
        Worker(
            core,
            [queries[column][row].cons(), keys[column].cons(), states[column][row].prod(), init, attend],
            placement=Tile(column, 2 + row),
        )
        for column in range(g.columns)
        for row in rows
    ]

    query_bytes, keys_bytes, state_words = design.buffer_bytes[0], design.buffer_bytes[1], design.buffer_bytes[2] // 4
    query_part, state_part = query_bytes // g.columns, state_words // g.columns
    types = _array(query_bytes, np.int8), _array(keys_bytes, np.int8), _array(state_words, np.int32)
    runtime = Runtime()
    with runtime.sequence(*types) as (q, k, o):
        runtime.start(*workers)
        for c in range(g.columns):
            tap = TensorAccessPattern((query_bytes,), c * query_part, [1, 1, 1, query_part], [0, 0, 0, 1])
            runtime.fill(query_in[c].prod(), q, tap, placement=Tile(c, 0))
            tap = TensorAccessPattern((keys_bytes,), 0, [1, 1, 1, keys_bytes], [0, 0, 0, 1])
            runtime.fill(keys_in[c].prod(), k, tap, placement=Tile(c, 0))
        for c in range(g.columns):
            tap = TensorAccessPattern((state_words,), c * state_part, [1, 1, 1, state_part], [0, 0, 0, 1])
            runtime.drain(state_out[c].cons(), o, tap, wait=True, placement=Tile(c, 0))
    return Program(DEVICES[design.target](), runtime).resolve_program(SequentialPlacer())


def _array(size, dtype):
    return np.ndarray[(size,), np.dtype[dtype]]
