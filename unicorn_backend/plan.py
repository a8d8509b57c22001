"""A plan is data: what a compiled graph runs, where, how many bytes it reads, and what it left and why.

`explain` prints it; nothing here knows a device or a graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

TYPICAL = 512
"""Tokens of the prompt, and keys of the decode step, that predictions are printed for."""


@dataclass(frozen=True)
class Step:
    """One op of a compiled graph."""

    kind: str  # "attention", "qkv", "ffn", "linear", "embedding", "norm"
    where: str  # module path its weights came from ("model.layers.0.mlp"), or the node's name
    op: str  # "unicorn::int4_ffn"
    device: str  # "cpu", or as options name it
    schemes: tuple[str, ...]  # of its weights, in the order of the op's arguments
    weight_bytes: int  # packed bytes that one call reads
    reason: str = ""  # why this device: its chip and driver, or why the CPU; "" where there was no choice
    weights: tuple[int, ...] = ()  # number of weights of each list, beside `schemes`
    width: int = 0  # values per token that are quantized or written beside the products
    tokens: int = 0  # per call where the graph fixes them (the head after a prompt: 1); 0: those of the plan
    key_macs: int = 0  # attention: multiply-adds per query token and key
    key_heads: int = 0  # attention: query heads
    key_bytes: int = 0  # attention: bytes of K and V per key
    kv_heads: int = 0  # attention: heads of K and V
    least_tokens: int = 1  # tokens per call from which `device` runs it; shorter calls run on the CPU
    predicted_us: tuple[tuple[str, float], ...] = ()  # (device, time) where there was a choice, at `Plan.typical`
    together_us: float | None = None  # attention in chunks beside its feed-forward: predicted for both, likewise


@dataclass(frozen=True)
class Measured:
    """Median time of one region in calls of one size."""

    step: int  # index into `Plan.steps`
    tokens: int  # per call, all sequences together
    keys: int  # attention: of the median call; else 0
    us: float
    calls: int


@dataclass(frozen=True)
class Left:
    """Something that plain torch runs, and why."""

    kind: str
    where: str
    reason: str


@dataclass
class Plan:
    """Everything that one compiled graph does."""

    graph: int  # running number of the compiled graph in this process
    tokens: str  # tokens per call: a number, or "dynamic"
    steps: list[Step] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    torch_ops: dict[str, int] = field(default_factory=dict)  # plain torch ops that remain, by name
    note: str = ""  # why nothing was taken, if so
    order: list[int] = field(default_factory=list)  # of the steps' results, where it is not that of the steps
    measured: list[Measured] = field(default_factory=list)  # what `timed` saw last

    @property
    def typical(self) -> tuple[int, int]:
        """(tokens, keys) of the call that predictions are printed for."""
        tokens = int(self.tokens) if self.tokens.isdigit() else TYPICAL
        return tokens, max(tokens, TYPICAL)

    @property
    def weight_bytes(self) -> int:
        """Packed bytes that one call reads."""
        return sum(step.weight_bytes for step in self.steps)

    def summary(self) -> str:
        """One line for the log."""
        kinds = Counter(step.kind for step in self.steps)
        taken = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "nothing"
        elsewhere = Counter(step.device for step in self.steps if step.device != "cpu")
        taken += "".join(f", {count} of them on {device}" for device, count in sorted(elsewhere.items()))
        torch_ops = sum(self.torch_ops.values())
        return (
            f"graph {self.graph} (tokens {self.tokens}): {taken}; {self.weight_bytes / 1e6:.1f} MB of weights per "
            f"call; {torch_ops} plain torch ops; {len(self.left)} left with a reason{'; ' * bool(self.note)}{self.note}"
        )


def placements(plans: Iterable[Plan]) -> list[str]:
    """Why regions are where they are, where there was a choice: equal ones of a graph folded, equal lines said once."""
    lines: dict[str, None] = {}
    for plan in plans:
        folded = Counter((step.kind, step.device, step.reason) for step in plan.steps if step.reason)
        lines |= {f"{kind} x{number} on {device}: {reason}": None for (kind, device, reason), number in folded.items()}
    return list(lines)
