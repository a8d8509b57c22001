"""What the NPU is expected to take, against the CPU: decides which lengths of prompt go there.

Nothing here was measured on an NPU by this project. The defaults are estimates from published figures (int8 GEMM of
6.8 and 38 TOPS on XDNA 1 and 2, arXiv 2512.13282, at some 75 % of it; launches of 45 to 128 us); the attention core
at a quarter of the GEMM's rate is a guess. On hardware the self-tests time one launch of each kernel, tiling on the
host included, and those figures replace the defaults for that machine from the next placement on.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

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
CPU = Rates(2.8, 1.5, 3.0, "estimate: 8 cores of Zen 4 with VNNI")


@dataclass(frozen=True)
class Sizes:
    """Of one attention layer."""

    hidden: int
    heads: int
    kv_heads: int
    dim: int

    def microseconds(self, rates: Rates, tokens: int, launches: int) -> float:
        """Projections and causal attention of a prompt of `tokens`."""
        weights = self.hidden * (2 * self.heads + 2 * self.kv_heads) * self.dim
        core = 2 * tokens * (tokens + 1) * self.heads * self.dim
        return (2 * tokens * weights / rates.gemm_tops + core / rates.attention_tops) / 1e6 + launches * rates.launch_us


def least_tokens(target: str, policy: str, rates: Rates) -> tuple[int, str]:
    """(tokens from which a region goes to the NPU, or 0 for never; the reason).

    Sizes of Gemma 3 4B stand for all: the ratio of the processors' rates decides, not the model.
    """
    sizes = Sizes(2560, 8, 4, 256)
    for tokens in (16, 32, 64, 128, 256, 512, 1024, 2048):
        launches = 2 * -(-tokens // 128) + sizes.kv_heads * -(-tokens // 256) * -(-tokens // 512)
        npu, cpu = sizes.microseconds(rates, tokens, launches), sizes.microseconds(CPU, tokens, 2)
        # "power": up to twice the time, for an estimated fifth of the watts.
        if npu < cpu * (2.0 if policy == "power" else 0.8):
            text = f"{npu / 1e3:.1f} ms against {cpu / 1e3:.1f} on 8 cores at {tokens} tokens ({rates.source})"
            return max(tokens, 256 if policy != "power" else 32), text
    return 0, f"never clearly faster than 8 CPU cores on {target} ({rates.source}); policy='power' uses it all the same"


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
