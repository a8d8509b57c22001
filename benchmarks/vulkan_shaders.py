#!/usr/bin/env python3
"""Time every shader on a Vulkan device with timestamp queries, and copies inside its memory; weights are cold.

    python benchmarks/vulkan_shaders.py --output 780m.json                  all of it, the best GPU, Gemma 3 1B
    python benchmarks/vulkan_shaders.py --device 780M --model gemma3-4b --peak-tops 16.6 --output 780m.json
    python benchmarks/vulkan_shaders.py --region head --tokens 1            or ffn, qkv

GB/s counts weight bytes and is compared with what the faster of two copies reads and writes (a shader's, and
vkCmdCopyBuffer); TOPS is two operations per multiply-add and is compared with `--peak-tops`, the device's int8 peak by
its data sheet. Where prompts go through cooperative matrices, packed dot products are timed beside them. On a software
driver (lavapipe, SwiftShader) times say nothing about a GPU: the result is marked so and carries none of these rates.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unicorn_backend import assets
from unicorn_backend.layouts import packed_bytes
from unicorn_backend.models.random import CONFIGS
from unicorn_backend.runtime import open_device
from unicorn_backend.runtime.vulkan import kernels, variants
from unicorn_backend.runtime.vulkan.cost import weight
from unicorn_backend.runtime.vulkan.device import CALLS, VulkanDevice
from unicorn_backend.runtime.vulkan.logical import DEVICE, Dispatch, LogicalDevice

COLD_BYTES = 256 << 20  # of weights between two uses of the same one: beyond every cache of a GPU
COPIED_BYTES = 256 << 20
COPIED_BY_WORKGROUP = 16 << 10  # shaders/copy.comp
WARM_UP_S = 0.3  # an idle GPU has a lower clock: on an H100 the first 100 ms take three times as long
REGIONS = ("ffn", "qkv", "head")
SOFTWARE = "software driver: these times are no measurement of a GPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="", help="index, UUID or part of the name")
    parser.add_argument("--model", default="gemma3-1b", choices=sorted(CONFIGS))
    parser.add_argument("--region", nargs="+", default=list(REGIONS), choices=REGIONS)
    parser.add_argument("--peak-tops", type=float, help="int8, by the data sheet")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 64, 512])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=0, help="0: as many as are needed for cold weights")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    assets.load_native()
    device: Any = open_device(f"vulkan:{options.device}".rstrip(":"))
    if isinstance(device, str):
        sys.exit(f"no device: {device}")
    software = device.physical.kind == "software"
    result: dict[str, Any] = {"model": options.model, "device": device.label, "software": software}
    copies = {} if software else copy_rates(device._device, options.rounds)
    result |= {"note": SOFTWARE} if software else {"copy_gb_per_s": copies}
    ceiling = Ceiling(max(copies.values(), default=None), options.peak_tops)
    result["regions"] = [measure(device, kind, options, ceiling) for kind in options.region]
    text = json.dumps(result, indent=1) + "\n"
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    print(text, end="")


class Ceiling(NamedTuple):
    """What rates are compared with; None: not known."""

    copy_gb_per_s: float | None
    peak_tops: float | None


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


def measure(device: Any, kind: str, options: argparse.Namespace, ceiling: Ceiling) -> dict[str, Any]:
    """Median microseconds of each stage of a region, and what they mean where the device is one."""
    make = region_of(options.model, kind)
    first = make()
    layer_bytes = sum(first.bytes.values())
    regions = [first, *(make() for _ in range((options.layers or max(COLD_BYTES // layer_bytes, 1)) - 1))]
    found = [_with_variant(device, regions, options.tokens, options.rounds, ceiling)]
    prompts = [tokens for tokens in options.tokens if tokens > kernels.BUCKETS[-1]]
    if device.variant.matrix and prompts:
        plain = VulkanDevice(device.name, device.physical, "dot8_subgroup")
        found.append(_with_variant(plain, regions, prompts, options.rounds, ceiling))
        plain.close()
    about = {"region": kind, "layers": len(regions), "layer_bytes": layer_bytes, "rounds": options.rounds}
    return {**about, "variants": found}


def _with_variant(
    device: Any, regions: list[Region], token_counts: list[int], rounds: int, ceiling: Ceiling
) -> dict[str, Any]:
    first, rows = regions[0], []
    for tokens in dict.fromkeys(min(tokens, _most(first, tokens)) for tokens in token_counts):
        found = _times(device, regions, tokens, rounds)
        times = dict.fromkeys(first.stages, 0.0)
        # a head that is larger than a buffer may be has several products, the last stages
        for stage, us in zip(
            (*first.stages, *first.stages[-1:] * (len(found) - len(first.stages))), found, strict=True
        ):
            times[stage] += us
        software = device.physical.kind == "software"
        rows.append({"tokens": tokens, "us": times} | ({} if software else rates(first, times, tokens, ceiling)))
    return {"variant": device.variant.name, "rows": rows}


def rates(region: Region, us: dict[str, float], tokens: int, ceiling: Ceiling) -> dict[str, Any]:
    """Of the stages that multiply."""
    read = {stage: size / us[stage] / 1e3 for stage, size in region.bytes.items()}
    tops = {stage: 2 * n * k * tokens / us[stage] / 1e6 for stage, (n, k, _) in region.products.items()}
    found = {"gb_per_s": read, "tops": tops}
    if ceiling.copy_gb_per_s:
        found["of_copy"] = {stage: rate / ceiling.copy_gb_per_s for stage, rate in read.items()}
    if ceiling.peak_tops:
        found["of_peak"] = {stage: rate / ceiling.peak_tops for stage, rate in tops.items()}
    return found


def copy_rates(logical: LogicalDevice, rounds: int) -> dict[str, float]:
    """GB/s of copies from device memory to device memory, read and written bytes together: the best of the rounds."""
    source, target = (logical.buffer(COPIED_BYTES, DEVICE) for _ in range(2))
    copy = logical.pipeline(variants.code("copy"), [])
    shader = Dispatch(copy, ((0, source), (6, target)), (COPIED_BYTES // COPIED_BY_WORKGROUP, 1))
    clock = logical.new_clock(1)
    ways = {
        "shader": logical.record([shader], clock=clock),
        "vkCmdCopyBuffer": logical.record_copy(source, target, COPIED_BYTES, clock),
    }
    found = {}
    for way, recorded in ways.items():
        best = float("inf")
        for _ in range(rounds + 1):
            logical.run(recorded)
            best = min(best, *logical.times_us(clock, 1))
        found[way] = 2 * COPIED_BYTES / best / 1e3
        logical.forget(recorded)
    logical.forget_clock(clock)
    for buffer in (source, target):
        logical.free(buffer)
    return found


def _most(region: Region, tokens: int) -> int:
    """Tokens that one submit takes."""
    call = CALLS[region.op](*region.arguments(torch.zeros(tokens, region.hidden).bfloat16()))
    most: int = call.shape.max_tokens
    return most


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
        bucket = kernels.bucket_of(tokens)
        stages = len(made.stages(uploaded.weights, bucket))
        clock = logical.new_clock(stages)
        recordings.append((made, uploaded.weights, bucket, made.record(uploaded.weights, bucket, clock), clock))
    found: list[list[float]] = []
    warm = time.perf_counter() + (0.0 if device.physical.kind == "software" else WARM_UP_S)
    number = -1  # the round after warming up is number 0, and is not counted
    while number < rounds:
        number += time.perf_counter() > warm
        for made, weights, bucket, recorded, clock in recordings:
            made.set_grids(weights, bucket, tokens)
            logical.run(recorded)
            if number > 0:
                found.append(logical.times_us(clock, stages))
    for *_, recorded, clock in recordings:
        logical.forget(recorded)
        logical.forget_clock(clock)
    return [statistics.median(times) for times in zip(*found, strict=True)]


if __name__ == "__main__":
    main()
