"""The torch.compile backend: normalise, match, rewrite, describe, place, run.

Registered under the name "unicorn" by the entry point group `torch_dynamo_backends`, so
`torch.compile(model, backend="unicorn")` needs no import of this package.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from unicorn_backend import assets
from unicorn_backend.errors import StrictModeError
from unicorn_backend.graph.capture import normalise
from unicorn_backend.graph.describe import describe, parameter_names
from unicorn_backend.graph.lower import lower
from unicorn_backend.graph.pattern import Reason
from unicorn_backend.graph.rewrite import rewrite
from unicorn_backend.integration import compile_cache, prepare, torch_hooks, weights_once
from unicorn_backend.options import Options
from unicorn_backend.partition.place import place
from unicorn_backend.plan import Left, Plan

log = logging.getLogger(__name__)

_numbers = itertools.count(1)
_said: set[str] = set()  # reasons why something is not on a device: a warning once per process, then information


def unicorn(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | Options | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile one Dynamo graph. Returns a callable with the graph's inputs and outputs.

    What is not matched runs as plain torch; `unicorn_backend.explain(model)` lists it with reasons.
    `mode` is accepted for the sake of callers that always pass one, and changes nothing.
    Raises OptionError (unknown option), QuantizationError (bad weights), StrictModeError.
    """
    parsed = Options.parse(options)
    if note := leave_alone(example_inputs):
        return _pass_through(gm, parsed, note)
    normal = normalise(gm)
    if isinstance(normal, str):
        return _pass_through(gm, parsed, normal)
    taken = rewrite(normal)
    if not taken.regions and not prepare.has_quantized(example_inputs):
        note = prepare.reason_for_nothing() or "no attention or gated feed-forward was matched"
        return _pass_through(gm, parsed, note, taken.reasons)
    prepare.quantize_owners(parsed, taken.regions, normal, example_inputs)
    placeholders = [node for node in normal.graph.nodes if node.op == "placeholder"]
    names = dict(zip(placeholders, parameter_names(gm), strict=True))
    plan = describe(normal, names, taken.reasons, next(_numbers))
    compile_cache.graph_made(normal, plan)
    return finish(normal, plan, parsed)


def load(normal: GraphModule, plan: Plan, options: Options) -> Callable[..., Any]:
    """The same end for a graph that the compile cache kept."""
    plan.graph = next(_numbers)
    return finish(normal, plan, options)


def finish(normal: GraphModule, plan: Plan, options: Options) -> Callable[..., Any]:
    """The callable that Dynamo will run for `plan`: a native program, or the graph's own generated Python.

    `normal` is not changed: the compile cache keeps it, without devices. It may come from there: no `meta` then.

    Why not Inductor for what is left beside our ops: it needed 76-189 s for one decode graph of a stock
    26-layer model on two cores, and what is left is about 8 small torch ops per layer at 1-3 us each.
    """
    graph, sites = place(normal, plan, options)
    _report(plan, options)
    lowered = lower(graph)
    if isinstance(lowered, str):
        log.info("graph %d runs as generated Python: %s", plan.graph, lowered)
        run = weights_once.split(graph.forward, functools.partial(_bind, graph.forward))
    else:
        run = weights_once.split(lowered, lowered.bind)
    run._sites = sites  # type: ignore[attr-defined]  # what it calls by number lives as long as it does
    return run


def _bind(
    run: Callable[..., Any], places: Sequence[int], inputs: Sequence[Any], sizes: Sequence[tuple[int, int, int]]
) -> Callable[..., Any]:
    """What `Lowered.bind` does, for a Python function. It computes all scores, however few are wanted."""
    fixed = dict(zip(places, inputs, strict=True))
    left_out = fixed.keys() | {place for place, _, _ in sizes}

    def bound(*others: Any, best: int = 0) -> Any:
        count = len(others) + len(left_out)
        rest = iter(others)
        every: list[Any] = [fixed.get(at) if at in left_out else next(rest) for at in range(count)]
        for at, tensor, dimension in sizes:
            every[at] = every[tensor].shape[dimension]
        return run(*every)

    return bound


def reset() -> None:
    """Called by `torch._dynamo.reset()`: forget the plans of graphs that no longer exist."""
    prepare.forget_plans()
    _said.clear()


unicorn.reset = reset  # type: ignore[attr-defined]


def leave_alone(example_inputs: Sequence[Any]) -> str:
    """Why a graph must run unchanged ("" if it need not): gradients, or tensors off the CPU."""
    tensors = [value for value in example_inputs if isinstance(value, torch.Tensor)]
    if any(hasattr(tensor, "to_local") for tensor in tensors):
        return "float weights are sharded over processes (DTensor): left to plain torch"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return (
            "gradients are required (grad mode is on and an input or parameter requires grad): left unquantized. "
            "For inference call it under torch.inference_mode() or torch.no_grad(), as generate() does"
        )
    foreign = sorted({tensor.device.type for tensor in tensors if tensor.device.type not in ("cpu", "meta")})
    if foreign:
        return f"tensors are on {', '.join(foreign)}, unicorn runs on the CPU: left to plain torch"
    return ""


def _pass_through(gm: GraphModule, options: Options, note: str, reasons: Sequence[Reason] = ()) -> Callable[..., Any]:
    plan = Plan(next(_numbers), "unknown", note=note)
    plan.left += [Left(reason.what, reason.where, reason.text) for reason in reasons]
    log.warning("graph %d runs as plain torch: %s", plan.graph, note)
    _report(plan, options)
    run: Callable[..., Any] = gm.forward
    return run


def _report(plan: Plan, options: Options) -> None:
    """Log `plan`, keep it for `explain`, and raise if `strict` and anything was left."""
    log.info("%s", plan.summary())
    for left in plan.left:
        log.debug("left to plain torch: %s at %s: %s", left.kind, left.where, left.reason)
    for reason in sorted({step.reason for step in plan.steps if step.device == "cpu" and step.reason}):
        log.log(logging.INFO if reason in _said else logging.WARNING, "graph %d: on the cpu: %s", plan.graph, reason)
        _said.add(reason)
    prepare.remember_plan(plan)
    if options.strict and plan.left:
        lines = "\n".join(f"  {left.kind} at {left.where}: {left.reason}" for left in plan.left)
        raise StrictModeError(f"strict=True and {len(plan.left)} things were left to plain torch:\n{lines}")


assets.load_native()
torch_hooks.install()
weights_once.install()
compile_cache.install(torch_hooks.options_of_callback, load)
