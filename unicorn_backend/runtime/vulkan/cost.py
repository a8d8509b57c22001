"""What a region is predicted to take on a Vulkan device, and measuring it (`unicorn calibrate`).

Without a calibration: guesses by the kind of device, from the reasoning in docs/vulkan.md; none was ever measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unicorn_backend import __version__
from unicorn_backend.layouts import empty_packed, packed_bytes
from unicorn_backend.partition import calibration, cost
from unicorn_backend.partition.cost import ESTIMATED, TOKENS, Table, interpolate
from unicorn_backend.plan import Step
from unicorn_backend.runtime.vulkan.physical import PhysicalDevice

SCHEMES = ("w4g32", "w8c", "w8a")
# kind -> (us per submit, GB/s, multiply-adds per second in 1e9)
GUESSES = {"integrated": (60.0, 60.0, 2000.0), "discrete": (80.0, 300.0, 8000.0)}
COLD_BYTES = 256 << 20  # of weights between two uses of the same one


@dataclass(frozen=True)
class Rates:
    """All times in us, with copies of the activations to and from the device."""

    source: str
    submit_us: float
    weights: dict[str, Table]  # scheme -> tokens per call -> per million weights


def identity(physical: PhysicalDevice) -> dict[str, Any]:
    """What the rates depend on: the device, its driver's build, what was measured, and this package."""
    about = {"device": physical.name, "driver": physical.cache_key, "version": __version__}
    return {**about, "schemes": list(SCHEMES)}


def rates(physical: PhysicalDevice) -> Rates:
    """Calibrated, or guessed."""
    found = calibration.load("vulkan", identity(physical))
    if found is not None:
        tables = {scheme: {int(t): us for t, us in table.items()} for scheme, table in found.rates["weights"].items()}
        return Rates(**{**found.rates, "weights": tables})
    submit, read, macs = GUESSES.get(physical.kind, GUESSES["integrated"])
    sizes = {scheme: packed_bytes(512, 512, scheme) / 512**2 for scheme in SCHEMES}
    guess = {s: {t: max(1e3 * size / read, 1e3 * t / macs) for t in TOKENS} for s, size in sizes.items()}
    return Rates(ESTIMATED, submit, guess)


def microseconds(step: Step, tokens: int, rates: Rates) -> float:
    """One call of a region whose weights are of SCHEMES."""
    each = zip(step.schemes, step.weights, strict=True)
    return rates.submit_us + sum(n / 1e6 * interpolate(rates.weights[scheme], tokens) for scheme, n in each)


Arguments = tuple[Any, ...]


def calibrate(
    device: Any, tokens: Sequence[int] = TOKENS, hidden: int = 1152, width: int = 6912, cold_bytes: int = COLD_BYTES
) -> Rates | str:
    """Time feed-forwards (w4g32) and linears (w8c, w8a) on an open VulkanDevice; a `str` says why it cannot."""
    submit = _us(device, "int4_ffn", [_ffn(32, 64)], 1, 32)
    if isinstance(submit, str):
        return submit
    tables: dict[str, Table] = {}
    for scheme in SCHEMES:
        op = "int4_ffn" if scheme == "w4g32" else "linear"
        weights = (3 if op == "int4_ffn" else 1) * hidden * width
        count = max(int(cold_bytes / (weights * packed_bytes(512, 512, scheme) / 512**2)), 2)
        layers = [_ffn(hidden, width) if op == "int4_ffn" else _linear(hidden, width, scheme) for _ in range(count)]
        tables[scheme] = table = {}
        for t in tokens:
            us = _us(device, op, layers if t <= cost.FEW else layers[:2], t, hidden)
            if isinstance(us, str):
                return us
            table[t] = max(us - submit, 0.0) / (weights / 1e6)
    return Rates(f"measured on {time.strftime('%Y-%m-%d', time.gmtime())}", submit, tables)


def weight(n: int, k: int, scheme: str) -> list[Tensor]:
    """Any bytes, scaled so that products are finite."""
    packed, scale, *rest = empty_packed(n, k, scheme)
    packed.random_(0, 256)
    scale.fill_(2**-10)
    return [packed, scale, *(z.fill_(128) for z in rest)]


def _ffn(hidden: int, width: int) -> Callable[[Tensor], Arguments]:
    weights = [weight(n, k, "w4g32") for n, k in ((width, hidden), (width, hidden), (hidden, width))]
    norm = torch.ones(hidden).bfloat16()
    return lambda x: (x, norm, 1e-6, 0.0, *weights, [], "gelu_tanh", width, hidden, norm, 1e-6, 0.0, x)


def _linear(hidden: int, width: int, scheme: str) -> Callable[[Tensor], Arguments]:
    packed = weight(width, hidden, scheme)
    return lambda x: (x, packed, None, width)


def _us(device: Any, op: str, layers: Sequence[Callable[[Tensor], Arguments]], tokens: int, hidden: int) -> float | str:
    """Median of a call, each layer's weights read once per round."""
    x = torch.randn(tokens, hidden).bfloat16()
    times = []
    for number in range(3 if len(layers) > 1 else 20):
        for layer in layers:
            arguments = layer(x)
            start = time.perf_counter()
            region = device.region(op, arguments)
            result = region if isinstance(region, str) else region.run(arguments)
            if isinstance(result, str):
                return result
            times += [time.perf_counter() - start] * (number > 0)  # the first one uploads and compiles
    return statistics.median(times) * 1e6
