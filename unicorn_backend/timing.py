"""`with timed(model): ...`: how long each region of the compiled graphs takes, for `explain` to show.

The native program that runs a graph (`ops/program.cpp`) reads the clock around each of our ops while it is asked to;
otherwise nothing is in the way. A graph that runs as generated Python is not timed. torch's profiler shows the same ops
by name, and what they call.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from unicorn_backend.assets import load_native
from unicorn_backend.graph import describe
from unicorn_backend.plan import Measured, Plan
from unicorn_backend.runtime import overlap
from unicorn_backend.runtime.placed import tokens_of

OPS = {op._schema.name.removeprefix("unicorn::") for op in describe.OPS}


@dataclass(frozen=True)
class Event:
    """One call of an op of a plan."""

    op: str  # as in `Step.op`
    tokens: int
    keys: int  # attention; else 0
    us: float


@contextmanager
def timed(model: Any) -> Iterator[None]:
    """Time the regions of `model`'s compiled graphs while the block runs; each plan keeps the medians (`measured`).
    No two regions run at once meanwhile.

    model: as for `explain`. Run the compiled model once before: what is compiled inside the block is timed too.
    """
    from unicorn_backend.integration.prepare import plans_of

    load_native()
    program = torch.classes.unicorn.Program
    program.traced()
    program.trace(True)
    overlap.enabled = False
    try:
        yield
    finally:
        overlap.enabled = True
        program.trace(False)
        assign(plans_of(getattr(model, "_orig_mod", model)), [e for t in program.traced() if (e := _event(*t))])


def assign(plans: Sequence[Plan], events: Sequence[Event]) -> None:
    """Give each plan the times of its calls, recognised by the order of their ops and by their tokens."""
    times: dict[int, dict[tuple[int, int], list[tuple[float, int]]]] = {plan.graph: defaultdict(list) for plan in plans}
    at = 0
    while at < len(events):
        plan = next((plan for plan in plans if _starts(plan, events, at)), None)
        if plan is None:
            at += 1  # an op that was called outside of these graphs
            continue
        for event, index in zip(events[at:], plan.order or range(len(plan.steps)), strict=False):
            times[plan.graph][index, event.tokens].append((event.us, event.keys))
        at += len(plan.steps)
    for plan in plans:
        plan.measured = [
            Measured(
                step,
                tokens,
                int(statistics.median(k for _, k in seen)),
                statistics.median(u for u, _ in seen),
                len(seen),
            )
            for (step, tokens), seen in times[plan.graph].items()
        ]


def _starts(plan: Plan, events: Sequence[Event], at: int) -> bool:
    steps = [plan.steps[index] for index in plan.order] or plan.steps
    part = events[at : at + len(steps)]
    if not steps or len(part) < len(steps) or any(s.op != e.op for s, e in zip(steps, part, strict=True)):
        return False
    first = part[0].tokens
    return str(first) == plan.tokens if plan.tokens.isdigit() else first > 1


def _event(op: str, first: list[int], second: list[int], ns: int) -> Event | None:
    """None for an op that is no step of a plan."""
    name = op.removeprefix("unicorn::").removeprefix("placed_").removeprefix("finish_")  # that one's time is waiting
    if name not in OPS:
        return None
    tokens = math.prod(first) if name == "embedding" else tokens_of(name, first)
    return Event(f"unicorn::{name}", tokens, second[2] if name == "int8_attention" else 0, ns / 1e3)
