"""What a region is predicted to take on the CPU: launches, weights, and keys and values, from rates of this machine.

    time = launch + values + sum over weight lists of weights x rate(scheme, tokens)
           + for attention, keys x (multiply-adds x rate(tokens) + heads x rate(tokens))

`rate` is a table over the tokens per call, because the kernels change with it: one token is bound by reading the
weights, 512 by arithmetic, and what lies between is neither. `unicorn calibrate` measures the tables
(`calibration.py`); without it they are estimated from the number of threads and the instruction set, and say so.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from unicorn_backend import assets, measure
from unicorn_backend.layouts import SCHEMES, packed_bytes
from unicorn_backend.plan import Plan, Step

# Tokens per call -> us of the call per million weights, or per million multiply-adds of a token.
Table = dict[int, float]

TOKENS = (1, 2, 3, 4, 6, 8, 16, 32, 64, 128, 256, 512)
CACHED_BYTES = 16 << 20
"""Weights of a whole call up to here are read from the CPU's caches; half of the last one if that is less."""
ESTIMATED = "estimated: not calibrated (unicorn calibrate)"
SERIAL_MACS = 500_000  # `kSerial` of ops/regions.cpp: smaller products stay on one thread
FEW, KEY_BLOCK = 8, 128  # `kDecodeT` and `kKeyBlock` of ops/attention_api.inl


@dataclass(frozen=True)
class Rates:
    """Of the CPU with one number of threads. All times in us."""

    source: str  # when they were measured, or that they are estimated
    threads: int
    values: float  # per million values that are quantized or written beside products
    gathered: float  # per million values of an embedding
    read_gbps: float
    cold: dict[str, Table] = field(default_factory=dict)  # by scheme: weights that come from memory
    cached: dict[str, Table] = field(default_factory=dict)  # weights that come from the caches; few tokens only
    attention: Table = field(default_factory=dict)  # by query tokens, per million multiply-adds of one of them
    softmax: Table = field(default_factory=dict)  # the same per million keys and heads
    cold_launch: dict[str, float] = field(default_factory=dict)  # by kind of region: everything beside these, once
    cached_launch: dict[str, float] = field(default_factory=dict)  # the same where the weights come from the caches

    @property
    def estimated(self) -> bool:
        return self.source == ESTIMATED

    @classmethod
    def of_json(cls, data: Mapping[str, Any]) -> Rates:
        def table(found: Mapping[str, float]) -> Table:
            return {int(tokens): float(us) for tokens, us in found.items()}

        tables = {name: {s: table(t) for s, t in data[name].items()} for name in ("cold", "cached")}
        return cls(**{**data, **tables, "attention": table(data["attention"]), "softmax": table(data["softmax"])})


def microseconds(step: Step, tokens: int, keys: int, rates: Rates, cached: bool = False) -> float | None:
    """Time of one call with `tokens` per call on the CPU; None for a scheme that has no rate.

    keys: that a query of attention may see at the end of the call; its queries see `keys - tokens` more than none.
    """
    rate = rates.gathered if step.kind == "embedding" else rates.values
    total = (rates.cached_launch if cached else rates.cold_launch).get(step.kind, 0.0)
    total += tokens * step.width / 1e6 * rate
    for scheme, count in zip(step.schemes, step.weights, strict=True):
        us = _rate(rates, scheme, tokens, cached)
        if us is None:
            return None
        total += count / 1e6 * us * (rates.threads if tokens * sum(step.weights) < SERIAL_MACS else 1)
    return total + (attention_us(step, tokens, keys, rates) if step.key_macs else 0.0)


def predict(plan: Plan, step: Step, rates: Rates) -> float | None:
    """us of one call of a step at the plan's typical size on the CPU."""
    tokens, keys = plan.typical
    return microseconds(step, step.tokens or tokens, keys, rates, is_cached(plan))


def rows_worth(plan: Plan, rates: Rates, most: int) -> tuple[int, float]:
    """How many sequences a decode step should take, and how many times the tokens per second of one they get.

    The fewest, of powers of two up to `most`, with 0.9 of the best speed: beyond, each only waits longer. plan: of one
    token. A device beside the CPU is not looked at.
    """
    keys = plan.typical[1]

    def us(rows: int) -> float:
        found = 0.0
        for step in plan.steps:
            own = replace(step, key_macs=0)
            found += microseconds(own, rows * (step.tokens or 1), keys, rates, is_cached(plan)) or 0.0
            found += rows * attention_us(step, 1, keys, rates) if step.key_macs else 0.0
        return found

    tried = [1]
    while 2 * tried[-1] <= most:
        tried.append(2 * tried[-1])
    alone = us(1)
    gains = {rows: rows * alone / us(rows) for rows in tried}
    best = max(gains.values())
    rows = next(rows for rows in tried if gains[rows] >= 0.9 * best)
    return rows, gains[rows]


def attention_us(step: Step, tokens: int, keys: int, rates: Rates) -> float:
    """Scores, softmax and weighted values: bound by arithmetic, or by reading K and V."""
    seen = seen_keys(tokens, keys) / 1e6
    us = seen * (
        step.key_macs * interpolate(rates.attention, tokens) + step.key_heads * interpolate(rates.softmax, tokens)
    )
    return max(us, keys * step.key_bytes / rates.read_gbps / 1e3 if tokens == 1 else 0.0)


def seen_keys(tokens: int, keys: int) -> float:
    """Keys that the kernel computes for the average query: a prompt's come in blocks, some of them only partly seen."""
    exact = keys - (tokens - 1) / 2
    return exact if tokens <= FEW else min(exact + KEY_BLOCK / 2, float(keys))


def is_cached(plan: Plan) -> bool:
    """Whether the weights of a call come from the CPU's caches."""
    last = measure.last_level_cache_bytes()
    return 0 < plan.weight_bytes <= min(CACHED_BYTES, last // 2)


def interpolate(table: Table, tokens: int) -> float:
    """us at `tokens` per call: linear between the table's points, proportional beyond its end."""
    below = max((t for t in table if t <= tokens), default=min(table))
    above = min((t for t in table if t >= tokens), default=below)
    if below == above:
        return table[below] * max(tokens / below, 1.0)
    return table[below] + (table[above] - table[below]) * (tokens - below) / (above - below)


def _rate(rates: Rates, scheme: str, tokens: int, cached: bool) -> float | None:
    table = rates.cached.get(scheme) if cached else None
    if not table or tokens > max(table):
        table = rates.cold.get(scheme)
    return interpolate(table, tokens) if table else None


# ---- without a calibration -----------------------------------------------------------------------------------------

# Multiply-adds per second and thread, in 1e9: some two thirds of the units' peak at 4 GHz.
MACS_PER_THREAD = {"avx512amx": 400.0, "avx512vnni": 175.0, "avx2": 60.0, "portable": 2.0}
# Of attention and float weights.
FLOAT_MACS_PER_THREAD = {"avx512amx": 60.0, "avx512vnni": 60.0, "avx2": 30.0, "portable": 2.0}
READ_GBPS, READ_GBPS_PER_THREAD = 45.0, 15.0  # dual-channel DDR5; what one core of it can read


@functools.cache
def estimate(threads: int = 0, isa: str = "") -> Rates:
    """Rates of a CPU that was not calibrated, from its threads and instruction set alone."""
    threads = threads or torch.get_num_threads()
    isa = isa or assets.isa()
    read = min(READ_GBPS, READ_GBPS_PER_THREAD * threads)
    macs, floats = (rate.get(isa, rate["portable"]) * threads for rate in (MACS_PER_THREAD, FLOAT_MACS_PER_THREAD))
    sizes = {scheme: packed_bytes(512, 512, scheme) / 512**2 for scheme in SCHEMES} | {"bfloat16": 2.0, "float32": 4.0}

    def table(scheme: str, gbps: float) -> Table:
        rate = macs if scheme in SCHEMES else floats
        return {t: max(1e3 * sizes[scheme] / gbps, 1e3 * t / rate) for t in TOKENS}

    attention = {t: 1e3 * t / floats for t in TOKENS}
    cold = {scheme: table(scheme, read) for scheme in sizes}
    softmax = {t: 1e3 * t / threads for t in TOKENS}
    launch = {"norm": 10.0, "embedding": 20.0, "linear": 20.0, "qkv": 25.0, "attention": 35.0, "ffn": 25.0}
    cached = {kind: us / 3 for kind, us in launch.items()}
    values, gathered = 400.0 / threads, 4e3 / threads
    return Rates(ESTIMATED, threads, values, gathered, read, cold, {}, attention, softmax, launch, cached)
