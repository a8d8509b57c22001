"""What a running generation does to the machine: tokens/s, GB/s, share of the memory ceiling, memory."""

from __future__ import annotations

import functools
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unicorn_backend import measure
from unicorn_backend.integration import screening

PROBE_BYTES = 256 << 20
"""Read to measure bandwidth when a model starts: beyond any laptop's cache, and done in some 30 ms."""


@functools.cache
def bandwidth_gbps() -> float:
    """Memory read bandwidth, measured once per process."""
    return measure.read_bandwidth(PROBE_BYTES, passes=3)


def resident_bytes() -> int:
    """Memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@dataclass(frozen=True)
class Meter:
    """Turns calls and seconds into GB/s. `weight_bytes`: read by each call of the model that needs all scores."""

    model: Any
    weight_bytes: int

    @classmethod
    def of(cls, model: Any) -> Meter:
        return cls(model, measure.weight_bytes(model))

    @property
    def in_cache(self) -> bool:
        return self.weight_bytes < measure.last_level_cache_bytes()

    def gbps(self, calls_per_second: float, context: int) -> float:
        """GB/s read by decoding at a context length."""
        weights = self.weight_bytes - screening.saved(self.model).per_call()
        return calls_per_second * (weights + measure.kv_bytes(self.model, context)) / 1e9

    def describe(self, tokens_per_second: float, calls_per_second: float, context: int) -> str:
        """`31.2 tok/s · 23.1 GB/s (61% of 37.9) · 1.2 GB memory`"""
        from unicorn_backend import table

        gbps = self.gbps(calls_per_second, context)
        share = "in cache" if self.in_cache else f"{gbps / bandwidth_gbps():.0%} of {bandwidth_gbps():.1f}"
        return f"{tokens_per_second:.1f} tok/s · {gbps:.1f} GB/s ({share}) · {table.size(resident_bytes())} memory"
