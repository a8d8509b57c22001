"""A plan is data: what a compiled graph runs, where, how many bytes it reads, and what it left and why.

`explain` prints it; nothing here knows a device or a graph.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


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

    @property
    def weight_bytes(self) -> int:
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
