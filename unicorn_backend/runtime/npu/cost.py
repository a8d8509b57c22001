"""What the NPU is expected to take.

Nothing here was measured on an NPU by this project. The defaults are estimates from published figures (int8 GEMM of
6.8 and 38 TOPS on XDNA 1 and 2, arXiv 2512.13282, at some 75 % of it; launches of 45 to 128 us); the attention core
at a quarter of the GEMM's rate is a guess. On hardware the self-tests time one launch of each kernel, tiling on the
host included, and those figures replace the defaults for that machine from the next placement on.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from unicorn_backend.plan import Step

FILE = "calibration.json"
SOURCE = "estimate from published figures, not measured"


@dataclass(frozen=True)
class Rates:
    """Of one processor. `source` says where they are from."""

    gemm_tops: float
    attention_tops: float
    launch_us: float
    source: str = SOURCE


ESTIMATES = {"npu1": Rates(5.0, 1.5, 110.0), "npu2": Rates(28.0, 8.0, 70.0)}
ROWS, KEYS, QUERIES = 128, 512, 256  # of one launch: tokens of a product; keys and query tokens of attention
READ_GBPS = 30.0  # of weights from memory, a guess


def microseconds(step: Step, tokens: int, keys: int, rates: Rates) -> float:
    """A qkv or attention region of a prompt: its products in whole launches, then scores and values."""
    launches = -(-tokens // ROWS)
    weights = sum(step.weights)
    us = max(2 * launches * ROWS * weights / rates.gemm_tops / 1e6, weights / READ_GBPS / 1e3)
    if step.key_macs:
        us += tokens * (keys - (tokens - 1) / 2) * 2 * step.key_macs / rates.attention_tops / 1e6
        launches += step.kv_heads * -(-tokens // QUERIES) * -(-keys // KEYS)
    return us + launches * rates.launch_us


def load(root: Path, target: str, label: str) -> Rates:
    """This machine's figures, or the estimates."""
    try:
        stored = json.loads((root / FILE).read_text())[label]
        return Rates(**stored)
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return ESTIMATES[target]


def store(root: Path, label: str, rates: Rates) -> None:
    """Keep measured figures for this machine, beside those of other devices."""
    root.mkdir(parents=True, exist_ok=True)
    path = root / FILE
    try:
        known = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        known = {}
    work = path.with_suffix(".writing")
    work.write_text(json.dumps({**known, label: asdict(rates)}, indent=2) + "\n")
    work.replace(path)
