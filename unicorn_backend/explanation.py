"""`explain(model)`: each region with its op, device, scheme and bytes, and a reason for all the rest."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass
from itertools import count
from statistics import median
from typing import Any

import torch
from torch import nn

from unicorn_backend.errors import UnicornError
from unicorn_backend.partition import calibration, cost
from unicorn_backend.partition.cost import Rates
from unicorn_backend.partition.memory import MemoryPlan, plan_memory
from unicorn_backend.plan import Left, Measured, Plan, Step, placements

KEYS_FOLDED = 64  # attention over numbers of keys in the same multiple of this is one line
PROBE_TOKENS = 4  # tokens of the forward pass that an uncompiled model is traced with


@dataclass(frozen=True)
class Explanation:
    """What `explain` found. `str()` is a table, `to_json()` the same as data."""

    model: str
    plans: tuple[Plan, ...]
    note: str = ""
    memory: MemoryPlan | None = None

    def to_json(self) -> str:
        rates = calibration.rates()
        plans = []
        for plan in self.plans:
            data = dataclasses.asdict(plan)
            for step, shown in zip(plan.steps, data["steps"], strict=True):
                shown["predicted_us"] = {"cpu": cost.predict(plan, step, rates), **dict(step.predicted_us)}
            data["measured"] = [dataclasses.asdict(found) for found in compare(plan, rates)]
            plans.append(data)
        about = {"source": rates.source, "threads": rates.threads}
        memory = dataclasses.asdict(self.memory) if self.memory is not None else None
        return json.dumps({"model": self.model, "note": self.note, "rates": about, "memory": memory, "plans": plans})

    def __str__(self) -> str:
        rates = calibration.rates()
        lines = [f"{self.model}: {len(self.plans)} compiled graph(s)" + (f" ({self.note})" if self.note else "")]
        for plan in self.plans:
            placed = (f"  {line}" for line in placements([plan]))
            lines += ["", plan.summary(), *_table(plan, rates), *placed, *_left(plan), *_measured(plan, rates)]
        if self.plans:
            lines += ["", f"predicted us per call: {rates.source}, {rates.threads} threads"]
        if self.memory is not None:
            lines += [str(self.memory)]
        return "\n".join(lines)

    __repr__ = __str__


def explain(model: Any, **inputs: Any) -> Explanation:
    """Explain what backend "unicorn" does with `model`.

    model: a module, or what `torch.compile(module, backend="unicorn")` returned. After a run the plans
    of its compiled graphs are shown; before, the model is traced once (nothing is quantized or
    changed) with `inputs`, by default a few token ids.
    Raises UnicornError if the model cannot be traced with these inputs.
    """
    from unicorn_backend.integration.prepare import plans_of

    root: nn.Module = getattr(model, "_orig_mod", model)
    if not isinstance(root, nn.Module):
        raise UnicornError(f"explain: got {type(model).__name__}, allowed is a torch.nn.Module or a compiled one")
    plans = plans_of(root)
    if plans:
        return Explanation(type(root).__name__, tuple(plans), memory=plan_memory(model, plans))
    note = "traced for this explanation, not compiled: weights are shown as they are now"
    plans = _trace(root, inputs)
    return Explanation(type(root).__name__, tuple(plans), note, plan_memory(model, plans))


def _trace(root: nn.Module, inputs: dict[str, Any]) -> list[Plan]:
    from unicorn_backend.graph.capture import normalise
    from unicorn_backend.graph.describe import describe, parameter_names
    from unicorn_backend.graph.rewrite import rewrite

    plans: list[Plan] = []
    numbers = count(1)

    def record(gm: torch.fx.GraphModule, _: Any) -> Any:
        normal = normalise(gm)
        if not isinstance(normal, str):
            taken = rewrite(normal)
            placeholders = [node for node in normal.graph.nodes if node.op == "placeholder"]
            names = dict(zip(placeholders, parameter_names(gm), strict=True))
            plans.append(describe(normal, names, taken.reasons, next(numbers)))
        return gm.forward

    arguments = inputs or {"input_ids": torch.arange(PROBE_TOKENS).unsqueeze(0)}
    try:
        with torch.no_grad():
            torch.compile(root.forward, backend=record)(**arguments)
    except TypeError as error:
        raise UnicornError(
            f"explain: {type(root).__name__} cannot be called with {', '.join(arguments)} ({error}); "
            "pass its inputs: explain(model, pixel_values=...), or run the compiled model once before"
        ) from error
    return plans


def _table(plan: Plan, rates: Rates) -> list[str]:
    """One line per distinct region; equal layers are folded with their count."""
    folded: Counter[tuple[str, ...]] = Counter()
    first: dict[tuple[str, ...], str] = {}
    for step in plan.steps:
        scheme, us = " ".join(dict.fromkeys(step.schemes)), predicted_us(plan, step, rates)
        key = (step.kind, step.op, step.device, scheme, f"{step.weight_bytes / 1e6:.3f}", _us(us))
        folded[key] += 1
        first.setdefault(key, step.where)
    tokens, keys = plan.typical
    at = f"us at {tokens}" + f", {keys} keys" * (tokens != keys)
    rows: list[tuple[str, ...]] = [("region", "op", "device", "scheme", "MB/call", at, "count", "first at")]
    rows += [(*key, str(number), first[key]) for key, number in folded.items()]
    return _align(rows)


def predicted_us(plan: Plan, step: Step, rates: Rates) -> float | None:
    """us of one call of a step on the device that it was placed on, at the plan's typical size."""
    placed = dict(step.predicted_us)
    return placed[step.device] if step.device in placed else cost.predict(plan, step, rates)


def _measured(plan: Plan, rates: Rates) -> list[str]:
    """Beside each measured time what is predicted for exactly that size; equal layers are folded into their median."""
    rows: list[tuple[str, ...]] = [("measured", "device", "tokens", "keys", "us", "predicted", "error", "count")]
    for found in compare(plan, rates):
        keys = str(found.keys) if found.keys else ""
        error = f"{found.predicted_us / found.us - 1:+.0%}" if found.predicted_us else ""
        counts = (_us(found.us), _us(found.predicted_us), error, str(found.count))
        rows.append((found.kind, found.device, str(found.tokens), keys, *counts))
    return _align(rows) if len(rows) > 1 else []


@dataclass(frozen=True)
class Comparison:
    """A kind of region in calls of one size: what was measured (`timing.timed`), and predicted for that size."""

    kind: str
    device: str
    tokens: int
    keys: int
    us: float  # median over the layers
    predicted_us: float | None  # None where there is no prediction
    count: int  # of layers


def compare(plan: Plan, rates: Rates) -> list[Comparison]:
    """What `timed` saw of a plan's regions, equal ones folded, in the order of the plan."""
    folded: dict[tuple[Any, ...], list[Measured]] = {}
    for found in plan.measured:
        step = plan.steps[found.step]
        near = found.keys // KEYS_FOLDED  # full and sliding layers see different numbers of keys
        folded.setdefault((step.kind, step.device, step.schemes, step.weights, found.tokens, near), []).append(found)
    result = []
    for (kind, device, *_), group in folded.items():
        step, tokens = plan.steps[group[0].step], group[0].tokens
        keys, us = int(median(g.keys for g in group)), median(g.us for g in group)
        on_cpu = device == "cpu" or tokens < step.least_tokens
        predicted = cost.microseconds(step, tokens, keys, rates, cost.is_cached(plan)) if on_cpu else None
        result.append(Comparison(kind, device if not on_cpu else "cpu", tokens, keys, us, predicted, len(group)))
    return result


def _left(plan: Plan) -> list[str]:
    lines = []
    if plan.torch_ops:
        most = Counter(plan.torch_ops).most_common(12)
        common = ", ".join(f"{name.removeprefix('aten.')} x{number}" for name, number in most)
        lines.append(f"  plain torch: {common}")
    folded: Counter[tuple[str, str]] = Counter((left.kind, left.reason) for left in plan.left)
    first: dict[tuple[str, str], Left] = {}
    for left in plan.left:
        first.setdefault((left.kind, left.reason), left)
    for key, number in folded.items():
        lines.append(f"  left: {key[0]} x{number} (first {first[key].where}): {key[1]}")
    return lines


def _us(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _align(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
