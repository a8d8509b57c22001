"""A picture of an explanation: where the time goes, and each region under the roofline. Needs the extra `plot`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from unicorn_backend.errors import OptionError
from unicorn_backend.explanation import Explanation, compare, predicted_us
from unicorn_backend.graph.describe import OPS
from unicorn_backend.partition import calibration
from unicorn_backend.partition.cost import Rates
from unicorn_backend.plan import Plan

FORMATS = (".png", ".svg")
KINDS = tuple(dict.fromkeys(kind for kind, _ in OPS.values()))  # each has its colour


def draw(explanation: Explanation, path: Path) -> None:
    """Write `path`, PNG or SVG. Raises OptionError for another ending, or without matplotlib."""
    if path.suffix not in FORMATS:
        raise OptionError(f"--plot: got {path.name!r}, the name must end in {' or '.join(FORMATS)}")
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise OptionError("--plot needs matplotlib: pip install 'unicorn-backend[plot]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rates = calibration.rates()
    figure, (times, roof) = plt.subplots(1, 2, figsize=(12, 4.5))
    plans = [plan for plan in explanation.plans if plan.steps]
    _times(times, plans, rates)
    _roofline(roof, plans, rates)
    figure.suptitle(f"{explanation.model}; rates {rates.source}, {rates.threads} threads")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _times(axes: Any, plans: list[Plan], rates: Rates) -> None:
    """Per graph the share of each kind of region and device in the predicted time."""
    names = [f"graph {plan.graph}\n{plan.typical[0]} tokens" for plan in plans]
    sums: list[Counter[str]] = []
    for plan in plans:
        found: Counter[str] = Counter()
        for step in plan.steps:
            found[f"{step.kind}, {step.device}"] += predicted_us(plan, step, rates) or 0.0  # type: ignore[assignment]
        sums.append(found)
    base = [0.0] * len(plans)
    for kind in dict.fromkeys(kind for found in sums for kind in found):
        shares = [found[kind] / max(sum(found.values()), 1e-9) for found in sums]
        colour = f"C{KINDS.index(kind.split(',')[0])}"
        hatch = None if kind.endswith(", cpu") else "//"
        axes.bar(names, shares, bottom=base, label=kind, width=0.5, color=colour, hatch=hatch)
        base = [a + b for a, b in zip(base, shares, strict=True)]
    for number, found in enumerate(sums):
        axes.annotate(f"{sum(found.values()) / 1e3:.2f} ms", (number, 1.0), ha="center", va="bottom")
    axes.set(ylabel="share of the predicted time", ylim=(0, 1.1))
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


def _roofline(axes: Any, plans: list[Plan], rates: Rates) -> None:
    """Operations per byte of weights against operations per second: hollow predicted, full measured."""
    peak = max(2e3 * max(table) / table[max(table)] for scheme, table in rates.cold.items() if scheme[0] in "wq")
    grid = [10 ** (i / 20 - 1) for i in range(101)]
    axes.plot(grid, [min(x * rates.read_gbps, peak) for x in grid], color="0.4")
    axes.annotate(f"{rates.read_gbps:.1f} GB/s, {peak:.0f} GOPS", (grid[-1], peak), ha="right", va="bottom")
    for plan in plans:
        seen = {}
        for step in plan.steps:
            tokens = step.tokens or plan.typical[0]
            us = predicted_us(plan, step, rates)
            if step.weight_bytes and us:
                seen[step.kind, tokens] = (step, us, "none")
        for found in compare(plan, rates):
            step = next(s for s in plan.steps if s.kind == found.kind)
            if step.weight_bytes:
                seen[found.kind, found.tokens] = (step, found.us, "full")
        for (kind, tokens), (step, us, style) in seen.items():
            operations = 2 * tokens * sum(step.weights)
            point = (operations / step.weight_bytes, operations / us / 1e3)
            axes.plot(*point, "o", color=f"C{KINDS.index(kind)}", fillstyle=style)
            axes.annotate(f"{kind} {tokens}", point, xytext=(5, -9), textcoords="offset points", fontsize="small")
    axes.set(xscale="log", yscale="log", xlabel="operations per byte of weights", ylabel="GOPS")
    axes.set_title("hollow: predicted, full: measured", fontsize="small")
    axes.grid(True, which="both", alpha=0.2)
