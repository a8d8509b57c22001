"""Which device runs each region of a graph, and why.

Placement comes after everything else: the compile cache keeps graphs without it, and each process places them on the
devices that it has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch.fx import Graph, GraphModule, Node

from unicorn_backend.graph.describe import OPS
from unicorn_backend.options import Options
from unicorn_backend.plan import Plan, Step
from unicorn_backend.runtime import open_device, placed
from unicorn_backend.runtime.device import Device, Work


def place(gm: GraphModule, plan: Plan, options: Options) -> tuple[GraphModule, list[placed.Site]]:
    """`gm` with placed calls in it, and their sites, for the caller to keep; `gm` itself if there are none.

    `plan`: what `describe` read off `gm`; its steps get their device and reason. `gm` is not changed. A region goes
    to the first of `options.devices` beside the CPU that takes it.
    """
    names = [name for name in options.devices if name != "cpu"]
    if not names:
        return gm, []
    devices = {name: open_device(name) for name in names}
    chosen: dict[Node, placed.Site] = {}
    for index, (node, step) in enumerate(zip(_nodes(gm), plan.steps, strict=True)):
        op = step.op.removeprefix("unicorn::")
        if op not in placed.OPS:
            continue
        device, reason = _choose(_work(node, step, plan.tokens, options.policy), devices)
        plan.steps[index] = dataclasses.replace(step, device=device.name if device else "cpu", reason=reason)
        if device is not None:
            chosen[node] = placed.Site(op, device, plan, index)
    return (_with_calls(gm, chosen), list(chosen.values())) if chosen else (gm, [])


def _choose(work: Work, devices: Mapping[str, Device | str]) -> tuple[Device | None, str]:
    """The device with its label, or None (the CPU) with every device's reason."""
    reasons = []
    for name, device in devices.items():
        reason = device if isinstance(device, str) else device.refuses(work)
        if not reason and not isinstance(device, str):
            return device, device.label
        reasons.append(f"{name}: {reason}")
    return None, "; ".join(reasons)


def _nodes(gm: GraphModule) -> list[Node]:
    """The nodes behind a plan's steps, in their order."""
    return [node for node in gm.graph.nodes if node.op == "call_function" and node.target in OPS]


def _work(node: Node, step: Step, tokens: str, policy: str) -> Work:
    """`node` may come from the compile cache: it has no `meta`."""
    names = [argument.name for argument in node.target._schema.arguments]
    constants = {n: v for n, v in zip(names, node.args, strict=True) if not _has_node(v)}
    _, positions = OPS[node.target]
    weights = [weight for position in positions for weight in node.args[position]]
    whole = all(weight.op == "placeholder" for weight in weights)
    return Work(step, tokens, constants, whole, policy)


def _has_node(value: Any) -> bool:
    return isinstance(value, Node) or (isinstance(value, Sequence) and any(isinstance(v, Node) for v in value))


def _with_calls(gm: GraphModule, chosen: Mapping[Node, placed.Site]) -> GraphModule:
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        copies[node] = copy = graph.node_copy(node, copies.__getitem__)
        if node in chosen:
            copy.target = placed.placed_op(node.target._schema.name.removeprefix("unicorn::"))
            copy.args = (*copy.args, chosen[node].number)
    return GraphModule(gm, graph)
