"""What a feed-forward is predicted to take on a Vulkan device, and measuring it (`unicorn calibrate`).

Without a calibration: guesses by the kind of device, from the reasoning in docs/vulkan.md; none was ever measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from unicorn_backend import __version__
from unicorn_backend.layouts import empty_packed
from unicorn_backend.partition import calibration, cost
from unicorn_backend.partition.cost import ESTIMATED, TOKENS, Table, interpolate
from unicorn_backend.plan import Step
from unicorn_backend.runtime.vulkan.physical import PhysicalDevice

BYTES_PER_WEIGHT = 0.5625  # w4g32
# kind -> (us per submit, GB/s, multiply-adds per second in 1e9)
GUESSES = {"integrated": (60.0, 60.0, 2000.0), "discrete": (80.0, 300.0, 8000.0)}
COLD_BYTES = 256 << 20  # of weights between two uses of the same one


@dataclass(frozen=True)
class Rates:
    """All times in us, with copies of the activations to and from the device."""

    source: str
    submit_us: float
    weights: Table  # tokens per call -> per million weights


def identity(physical: PhysicalDevice) -> dict[str, Any]:
    """What the rates depend on: the device, its driver's build, and this package."""
    return {"device": physical.name, "driver": physical.cache_key, "version": __version__}


def rates(physical: PhysicalDevice) -> Rates:
    """Calibrated, or guessed."""
    found = calibration.load("vulkan", identity(physical))
    if found is not None:
        return Rates(**{**found.rates, "weights": {int(t): us for t, us in found.rates["weights"].items()}})
    submit, read, macs = GUESSES.get(physical.kind, GUESSES["integrated"])
    return Rates(ESTIMATED, submit, {t: max(1e3 * BYTES_PER_WEIGHT / read, 1e3 * t / macs) for t in TOKENS})


def microseconds(step: Step, tokens: int, rates: Rates) -> float:
    """One call of a feed-forward region."""
    return rates.submit_us + sum(step.weights) / 1e6 * interpolate(rates.weights, tokens)


def calibrate(
    device: Any, tokens: Sequence[int] = TOKENS, hidden: int = 1152, width: int = 6912, cold_bytes: int = COLD_BYTES
) -> Rates | str:
    """Time feed-forwards of a size on an open VulkanDevice; a `str` says why it cannot."""
    submit = _us(device, 32, 64, 1, 1)
    if isinstance(submit, str):
        return submit
    copies = max(int(cold_bytes / (3 * hidden * width * BYTES_PER_WEIGHT)), 2)
    table = {}
    for t in tokens:
        us = _us(device, hidden, width, t, copies if t <= cost.FEW else 2)
        if isinstance(us, str):
            return us
        table[t] = max(us - submit, 0.0) / (3 * hidden * width / 1e6)
    return Rates(f"measured on {time.strftime('%Y-%m-%d', time.gmtime())}", submit, table)


def _us(device: Any, hidden: int, width: int, tokens: int, copies: int) -> float | str:
    x, norm = torch.randn(tokens, hidden).bfloat16(), torch.ones(hidden).bfloat16()
    layers = []
    for _ in range(copies):
        weights = [empty_packed(n, k, "w4g32") for n, k in ((width, hidden), (width, hidden), (hidden, width))]
        for packed, scale in weights:
            packed.random_(0, 256)
            scale.fill_(2**-10)
        layers.append((x, norm, 1e-6, 0.0, *weights, [], "gelu_tanh", width, hidden, norm, 1e-6, 0.0, x))
    times = []
    for number in range(3 if copies > 1 else 20):
        for arguments in layers:
            start = time.perf_counter()
            region = device.region("int4_ffn", arguments)
            result = region if isinstance(region, str) else region.run(arguments)
            if isinstance(result, str):
                return result
            times += [time.perf_counter() - start] * (number > 0)  # the first one uploads and compiles
    return statistics.median(times) * 1e6
