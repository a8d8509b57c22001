#!/usr/bin/env python3
"""Time each shader of a feed-forward on a Vulkan device with timestamp queries; weights are cold.

    python benchmarks/vulkan_shaders.py                                    the best GPU, layers of Gemma 3 1B
    python benchmarks/vulkan_shaders.py --device 780M --model gemma3-4b --output 780m.json

GB/s counts weight bytes, TOPS two operations per multiply-add. On a software driver (lavapipe, SwiftShader) times say
nothing about a GPU: the result is marked so and carries neither.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from unicorn_backend import assets
from unicorn_backend.layouts import pack_w4g32
from unicorn_backend.models.random import CONFIGS
from unicorn_backend.runtime import open_device
from unicorn_backend.runtime.vulkan import ffn, kernels

STAGES = ("norm_quant", "gate_up", "down", "norm_add")
COLD_BYTES = 256 << 20  # of weights between two uses of the same one: beyond every cache of a GPU
SOFTWARE = "software driver: these times are no measurement of a GPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="", help="index, UUID or part of the name")
    parser.add_argument("--model", default="gemma3-1b", choices=sorted(CONFIGS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 64, 512])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=0, help="0: as many as are needed for cold weights")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    assets.load_native()
    device: Any = open_device(f"vulkan:{options.device}".rstrip(":"))
    if isinstance(device, str):
        sys.exit(f"no device: {device}")
    result = measure(device, options.model, options.tokens, options.rounds, options.layers)
    text = json.dumps(result, indent=1) + "\n"
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    print(text, end="")


def measure(device: Any, model: str, token_counts: list[int], rounds: int, layers: int) -> dict[str, Any]:
    """Median microseconds of each stage, and what they mean where the device is one."""
    hidden, width = (CONFIGS[model][name] for name in ("hidden_size", "intermediate_size"))
    software = device.physical.kind == "software"
    layer_bytes = 3 * hidden * width * 9 // 16
    count = layers or max(COLD_BYTES // layer_bytes, 2)
    regions = [_region(device, hidden, width, seed) for seed in range(count)]
    rows = []
    for tokens in token_counts:
        times = _times(device, regions, hidden, tokens, rounds)
        row: dict[str, Any] = {"tokens": tokens, "us": dict(zip(STAGES, times, strict=True))}
        if not software:
            row |= _rates(dict(zip(STAGES, times, strict=True)), hidden * width, tokens)
        rows.append(row)
    facts = {"device": device.label, "variant": device.variant.name, "software": software, "model": model}
    note = {"note": SOFTWARE} if software else {}
    return {**facts, **note, "layers": count, "layer_bytes": layer_bytes, "rounds": rounds, "rows": rows}


def _rates(us: dict[str, float], matrix: int, tokens: int) -> dict[str, Any]:
    matrices = {"gate_up": 2 * matrix, "down": matrix}
    return {
        "gb_per_s": {stage: values * 9 / 16 / us[stage] / 1e3 for stage, values in matrices.items()},
        "tops": {stage: 2 * values * tokens / us[stage] / 1e6 for stage, values in matrices.items()},
    }


def _region(device: Any, hidden: int, width: int, seed: int) -> tuple[Any, tuple[Any, ...]]:
    g = torch.Generator().manual_seed(seed)
    weights = []
    for n, k in ((width, hidden), (width, hidden), (hidden, width)):
        q = torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=g)
        weights.append(pack_w4g32(q, torch.full((n, k // 32), 1 / (8 * k**0.5)).half()))
    x, norm = torch.randn(1, hidden, generator=g).bfloat16(), torch.zeros(hidden).bfloat16()
    arguments = (x, norm, 1e-6, 1.0, *weights, [], "gelu_tanh", width, hidden, norm, 1e-6, 1.0, x)
    region = device.region("int4_ffn", arguments)
    if isinstance(region, str):
        sys.exit(f"layer {seed}: {region}")
    return region, arguments


def _times(device: Any, regions: list[Any], hidden: int, tokens: int, rounds: int) -> list[float]:
    """Median of each stage over all layers and rounds, each layer's weights read once per round."""
    logical = device._device
    x = torch.randn(tokens, hidden).bfloat16()
    recordings = []
    for region, arguments in regions:
        call = ffn.Call(x, *arguments[1:-1], x)
        made = device.kernels(call.shape)
        clock = logical.new_clock(len(STAGES))
        bucket = next((b for b in kernels.BUCKETS if tokens <= b), 0)
        recordings.append((made, region.weights, made.record(region.weights, bucket, clock), clock))
    if tokens > made.shape.max_tokens:
        sys.exit(f"{tokens} tokens: at most {made.shape.max_tokens} go through one submit")
    found: list[list[float]] = []
    for number in range(rounds + 1):  # the first one warms up
        for made, weights, recorded, clock in recordings:
            made.set_grids(weights, tokens)
            logical.run(recorded)
            if number:
                found.append(logical.times_us(clock, len(STAGES)))
    for *_, recorded, clock in recordings:
        logical.forget(recorded)
        logical.forget_clock(clock)
    return [statistics.median(times) for times in zip(*found, strict=True)]


if __name__ == "__main__":
    main()
