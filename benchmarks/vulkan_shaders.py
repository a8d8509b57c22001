#!/usr/bin/env python3
"""Time each shader of a region on a Vulkan device with timestamp queries; weights are cold.

    python benchmarks/vulkan_shaders.py                                    the best GPU, layers of Gemma 3 1B
    python benchmarks/vulkan_shaders.py --device 780M --model gemma3-4b --output 780m.json
    python benchmarks/vulkan_shaders.py --region head --tokens 1            or qkv

GB/s counts weight bytes, TOPS two operations per multiply-add. On a software driver (lavapipe, SwiftShader) times say
nothing about a GPU: the result is marked so and carries neither.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unicorn_backend import assets
from unicorn_backend.layouts import packed_bytes
from unicorn_backend.models.random import CONFIGS
from unicorn_backend.runtime import open_device
from unicorn_backend.runtime.vulkan import kernels
from unicorn_backend.runtime.vulkan.cost import weight
from unicorn_backend.runtime.vulkan.device import CALLS

COLD_BYTES = 256 << 20  # of weights between two uses of the same one: beyond every cache of a GPU
SOFTWARE = "software driver: these times are no measurement of a GPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="", help="index, UUID or part of the name")
    parser.add_argument("--model", default="gemma3-1b", choices=sorted(CONFIGS))
    parser.add_argument("--region", default="ffn", choices=("ffn", "qkv", "head"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 64, 512])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=0, help="0: as many as are needed for cold weights")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    assets.load_native()
    device: Any = open_device(f"vulkan:{options.device}".rstrip(":"))
    if isinstance(device, str):
        sys.exit(f"no device: {device}")
    region = region_of(options.model, options.region)
    result = {"model": options.model, "region": options.region}
    result |= measure(device, region, options.tokens, options.rounds, options.layers)
    text = json.dumps(result, indent=1) + "\n"
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    print(text, end="")


@dataclass(frozen=True)
class Region:
    """What is measured."""

    op: str
    hidden: int
    stages: tuple[str, ...]
    products: dict[str, tuple[int, int, str]]  # stage -> rows and columns of what it multiplies with, all; scheme
    arguments: Callable[[Tensor], tuple[Any, ...]]  # of the op, with weights of their own

    @property
    def bytes(self) -> dict[str, int]:
        return {stage: packed_bytes(*product) for stage, product in self.products.items()}


def region_of(model: str, kind: str) -> Callable[[], Region]:
    """Makes one with new weights."""
    config = CONFIGS[model]
    hidden, width, rows = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads, d = config["num_attention_heads"], config["num_key_value_heads"], 256
    norm = torch.zeros(hidden).bfloat16()
    q, kv = heads * d, kv_heads * d

    def ffn() -> Region:
        w = [weight(n, k, "w4g32") for n, k in ((width, hidden), (width, hidden), (hidden, width))]
        return Region(
            "int4_ffn",
            hidden,
            ("norm_quant", "gate_up", "down", "norm_add"),
            {"gate_up": (2 * width, hidden, "w4g32"), "down": (hidden, width, "w4g32")},
            lambda x: (x, norm, 1e-6, 1.0, *w, [], "gelu_tanh", width, hidden, norm, 1e-6, 1.0, x),
        )

    def qkv() -> Region:
        w = [weight(n, hidden, "w8c") for n in (q, kv, kv)]
        scale = torch.zeros(d).bfloat16()
        return Region(
            "int8_qkv",
            hidden,
            ("norm_quant", "products", "products", "products", "heads"),
            {"products": (q + 2 * kv, hidden, "w8c")},  # side by side: only the sum of their times means something
            lambda x: (
                *(x[None], norm, 1e-6, 1.0, *w, [], scale, scale, 1e-6, 1.0),
                *torch.randn(2, 1, len(x), d).bfloat16(),
                *(heads, kv_heads, d, False, False),
            ),
        )

    def head() -> Region:
        w = weight(rows, hidden, "w8a")
        products = {"product": (rows, hidden, "w8a")}
        return Region("linear", hidden, ("norm_quant", "product"), products, lambda x: (x, w, None, rows))

    return {"ffn": ffn, "qkv": qkv, "head": head}[kind]


def measure(
    device: Any, make: Callable[[], Region], token_counts: list[int], rounds: int, layers: int
) -> dict[str, Any]:
    """Median microseconds of each stage, and what they mean where the device is one."""
    software = device.physical.kind == "software"
    first = make()
    layer_bytes = sum(first.bytes.values())
    regions = [first, *(make() for _ in range((layers or max(COLD_BYTES // layer_bytes, 1)) - 1))]
    rows = []
    for tokens in token_counts:
        found = _times(device, regions, tokens, rounds)
        times = dict.fromkeys(first.stages, 0.0)
        # a head that is larger than a buffer may be has several products, the last stages
        for stage, us in zip(
            (*first.stages, *first.stages[-1:] * (len(found) - len(first.stages))), found, strict=True
        ):
            times[stage] += us
        rows.append({"tokens": tokens, "us": times} | ({} if software else _rates(first, times, tokens)))
    facts = {"device": device.label, "variant": device.variant.name, "software": software}
    note = {"note": SOFTWARE} if software else {}
    return {**facts, **note, "layers": len(regions), "layer_bytes": layer_bytes, "rounds": rounds, "rows": rows}


def _rates(region: Region, us: dict[str, float], tokens: int) -> dict[str, Any]:
    return {
        "gb_per_s": {stage: size / us[stage] / 1e3 for stage, size in region.bytes.items()},
        "tops": {stage: 2 * n * k * tokens / us[stage] / 1e6 for stage, (n, k, _) in region.products.items()},
    }


def _times(device: Any, regions: list[Region], tokens: int, rounds: int) -> list[float]:
    """Median of each stage over all layers and rounds, each layer's weights read once per round."""
    logical = device._device
    x = torch.randn(tokens, regions[0].hidden).bfloat16()
    recordings = []
    for region in regions:
        call = CALLS[region.op](*region.arguments(x))
        uploaded = device.region(region.op, call)
        if isinstance(uploaded, str):
            sys.exit(uploaded)
        made = device.kernels(call.shape)
        if tokens > made.shape.max_tokens:
            sys.exit(f"{tokens} tokens: at most {made.shape.max_tokens} go through one submit")
        bucket = next((b for b in kernels.BUCKETS if tokens <= b), 0)
        stages = len(made.stages(uploaded.weights, bucket))
        clock = logical.new_clock(stages)
        recordings.append((made, uploaded.weights, made.record(uploaded.weights, bucket, clock), clock))
    found: list[list[float]] = []
    for number in range(rounds + 1):  # the first one warms up
        for made, weights, recorded, clock in recordings:
            made.set_grids(weights, tokens)
            logical.run(recorded)
            if number:
                found.append(logical.times_us(clock, stages))
    for *_, recorded, clock in recordings:
        logical.forget(recorded)
        logical.forget_clock(clock)
    return [statistics.median(times) for times in zip(*found, strict=True)]


if __name__ == "__main__":
    main()
