"""Decode at long contexts: what a step costs with so many keys, in the model's dtype and as int8 rows.

The caches are filled with random rows instead of a prompt (speed does not depend on them; a prompt of 16k tokens takes
minutes). Every round measures every context and kind of cache once, in turn. Writes
benchmarks/results/context-MODEL.json and prints it as a table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import tables
import torch
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

import unicorn_backend
from unicorn_backend import Int8Cache, measure
from unicorn_backend.models.random import random_model

RESULTS = Path(__file__).parent / "results"
KINDS = {"model": DynamicCache, "int8": Int8Cache}


class Clock(BaseStreamer):
    """When each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def filled(config: Any, kind: str, tokens: int) -> Any:
    """A cache that has seen `tokens` tokens."""
    cache = KINDS[kind](config=config)
    for layer in range(config.num_hidden_layers):
        rows = [torch.randn(1, config.num_key_value_heads, tokens, config.head_dim).bfloat16() for _ in range(2)]
        cache.update(*rows, layer)
    return cache


def cache_bytes(cache: Any) -> int:
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


def steps(model: Any, cache: Any, tokens: int) -> list[float]:
    """Seconds of each decode step but the first, whose guards are checked in full."""
    clock = Clock()
    ids = torch.ones(1, cache.get_seq_length() + 1, dtype=torch.long)
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "streamer": clock}
    model.generate(ids, past_key_values=cache, attention_mask=torch.ones_like(ids), **settings)
    return [after - before for before, after in zip(clock.times[2:], clock.times[3:], strict=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="gemma3-4b", help="gemma3-1b or gemma3-4b (random weights)")
    parser.add_argument("--contexts", type=int, nargs="+", default=[16, 8192, 16384])
    parser.add_argument("--tokens", type=int, default=12, help="per context, cache and round")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    original = random_model(arguments.model)
    unicorn_backend.quantize(original)
    model: Any = torch.compile(original, backend="unicorn")
    caches = {(n, kind): filled(original.config, kind, n) for n in arguments.contexts for kind in KINDS}
    for kind in KINDS:
        steps(model, filled(original.config, kind, 16), 4)  # compiles
    before = measure.read_bandwidth()
    times: dict[tuple[int, str], list[float]] = {key: [] for key in caches}
    for _ in range(arguments.rounds):
        for key, cache in caches.items():
            times[key] += steps(model, cache, arguments.tokens)
    weights = measure.weight_bytes(original)
    empty = statistics.median(times[min(arguments.contexts), "model"])
    rows = [
        {
            "context": n,
            "kv": kind,
            "step_ms": 1e3 * (step := statistics.median(times[n, kind])),
            "tok_s": 1 / step,
            "slower_than_empty": step / empty - 1,
            "mb_per_token": (weights + cache_bytes(caches[n, kind])) / 1e6,
            "gb_s": (weights + cache_bytes(caches[n, kind])) / step / 1e9,
            "cache_mb": cache_bytes(caches[n, kind]) / 1e6,
        }
        for n, kind in caches
    ]
    result = {
        "model": arguments.model,
        "rounds": arguments.rounds,
        "read_gb_s": [before, measure.read_bandwidth()],
        "rows": rows,
        "provenance": measure.provenance(),
    }
    out = RESULTS / f"context-{arguments.model}.json"
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(tables.context(result))


if __name__ == "__main__":
    main()
