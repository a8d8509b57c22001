"""Which device runs each region of a graph, and why.

Placement comes after everything else: the compile cache keeps graphs without it, and each process places them on the
devices that it has.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from unicorn_backend.graph.describe import OPS
from unicorn_backend.options import Options
from unicorn_backend.partition import branches, calibration, cost
from unicorn_backend.partition.cost import Rates
from unicorn_backend.plan import Plan, Step
from unicorn_backend.runtime import open_device, placed
from unicorn_backend.runtime.device import Device, Work
from unicorn_backend.runtime.overlap import Overlap
from unicorn_backend.table import size

# A device gets a region where its predicted time is below this times the CPU's. Predictions are some 20 % off, so a
# gain must be larger to be one; for "power", a device that takes up to twice as long still takes less energy.
MARGINS = {"speed": 0.8, "power": 2.0}
PROMPTS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


def place(gm: GraphModule, plan: Plan, options: Options) -> tuple[GraphModule, list[placed.Site]]:
    """`gm` with placed calls in it, and their sites, for the caller to keep; `gm` itself if there are none.

    `plan`: what `describe` read off `gm`; its steps get their device and reason. `gm` is not changed. Under policy
    "speed" and "power" predictions decide (`MARGINS`), under "fixed" a region goes to the first device that takes it.
    Layers fill a device in their order; what its memory does not hold any more stays on the CPU.
    """
    names = [name for name in options.devices if name != "cpu"]
    if not names:
        return gm, []
    devices = {name: open_device(name) for name in names}
    rooms = {name: _room(device) for name, device in devices.items() if not isinstance(device, str)}
    rates = calibration.rates()
    chosen: dict[Node, placed.Site] = {}
    steps = dict(zip(_nodes(gm), plan.steps, strict=True))
    for index, (node, step) in enumerate(steps.items()):
        op = step.op.removeprefix("unicorn::")
        if op not in placed.OPS:
            continue
        work = _work(node, step)
        offers = []
        for name in names:
            device, meanwhile = devices[name], []
            if op in placed.DEFERRED and options.policy != "fixed" and not isinstance(device, str):
                span = branches.spans(gm, {**chosen, node: placed.Site(op, device, plan, index)}).get(node)
                meanwhile = [steps[n] for n in span.between if n not in chosen] if span else []
            offers.append(offer(name, device, work, plan, options.policy, rates, rooms, meanwhile))
        best = min((o for o in offers if o.device), key=lambda o: o.us or 0.0, default=None)
        reason = (
            best.reason if best else "; ".join(f"{name}: {o.reason}" for name, o in zip(names, offers, strict=True))
        )
        known = tuple((o.device.name if o.device else n, o.us) for n, o in zip(names, offers, strict=True) if o.us)
        cpu = cost.predict(plan, step, rates)
        plan.steps[index] = dataclasses.replace(
            step,
            device=best.device.name if best and best.device else "cpu",
            reason=reason,
            least_tokens=best.least if best else 1,
            predicted_us=((("cpu", cpu),) if cpu is not None else ()) + known,
        )
        if best is not None and best.device is not None:
            rooms[best.name] -= step.weight_bytes
            chosen[node] = placed.Site(op, best.device, plan, index, best.least)
    if not chosen:
        return gm, []
    _overlap(chosen, plan, _nodes(gm), rates)
    apart = branches.spans(gm, chosen)
    _note(plan, gm, apart)
    return _with_calls(gm, chosen, apart), list(chosen.values())


def _overlap(chosen: dict[Node, placed.Site], plan: Plan, nodes: Sequence[Node], rates: Rates) -> None:
    """Let attentions in chunks run beside the feed-forwards that alone read them, on another device or the CPU."""
    for index, node in enumerate(nodes):
        first = chosen.get(node)
        if first is None or first.op != "int8_attention" or not (first.device and first.device.chunk):
            continue
        reader = _only_reader(node)
        if reader is None:
            continue
        second = chosen.get(reader) or placed.Site("int4_ffn", None, plan, nodes.index(reader))
        if second.device is first.device:
            continue
        chosen[reader] = second
        first.leads = second.follows = Overlap()
        step = plan.steps[index]
        beside = f"from {2 * first.device.chunk} tokens on in chunks beside the feed-forward"
        us = _together(first.device, second.device, step, _work(reader, plan.steps[nodes.index(reader)]), plan, rates)
        if us is not None:
            each = f"{us[0] / 1e3:.2f} ms predicted for both at {plan.typical[0]} tokens"
            beside += f", {each}, {us[1] / 1e3:.2f} one after the other, by which it was placed"
        together = us[0] if us is not None else None
        plan.steps[index] = dataclasses.replace(step, reason=f"{step.reason}; {beside}", together_us=together)


def _together(
    device: Device, other: Device | None, attention: Step, ffn: Work, plan: Plan, rates: Rates
) -> tuple[float, float] | None:
    """Predicted us of an attention in chunks beside its feed-forward, and of the two one after the other.

    At the plan's typical size; None where that is one chunk or has no prediction. Of `n` chunks all but one of the
    shorter region's are hidden. A feed-forward in chunks reads its weights with each of them. What two devices take
    from each other, memory and the host's part of the NPU's work, is not in it.
    """
    tokens, keys = plan.typical
    count = tokens // device.chunk
    first = dict(attention.predicted_us).get(device.name)
    if count < 2 or first is None:
        return None

    def alone(size: int) -> float | None:
        if other is None:
            return cost.microseconds(ffn.step, size, keys, rates, cost.is_cached(plan))
        found = other.predict(ffn, size, keys)
        return found[0] if found is not None else None

    part, whole = alone(tokens // count), alone(tokens)
    if part is None or whole is None:
        return None
    return first / count + (count - 1) * max(first / count, part) + part, first + whole


def _only_reader(node: Node) -> Node | None:
    """The feed-forward whose input, and residual if it has one, is `node`; None if anything else reads it."""
    readers = list(node.users)
    if len(readers) != 1 or readers[0].target is not torch.ops.unicorn.int4_ffn.default:
        return None
    return readers[0] if node is readers[0].args[0] else None


@dataclass(frozen=True)
class Offer:
    """Whether a device gets a region, and why."""

    name: str
    device: Device | None  # None: it does not
    reason: str
    least: int = 1  # tokens per call from which it runs there
    us: float | None = None  # predicted at the plan's typical size


def offer(
    name: str,
    device: Device | str,
    work: Work,
    plan: Plan,
    policy: str,
    rates: Rates,
    rooms: Mapping[str, float],
    meanwhile: Sequence[Step] = (),
) -> Offer:
    """What `policy` makes of a region on a device. `rooms`: bytes of weights that each device still holds.

    meanwhile: what the CPU computes while the device computes this one. Of more than `FEW` tokens that much of the
    device's time costs nothing; of fewer both read the same memory, so that it is not free.
    """
    if isinstance(device, str):
        return Offer(name, None, device)
    if refused := device.refuses(work):
        return Offer(name, None, refused)
    if device.software and policy != "fixed":
        return Offer(name, None, f"{device.label}: no faster than the CPU's own kernels; policy='fixed' uses it")
    if work.step.weight_bytes > rooms[name]:
        return Offer(
            name, None, f"its memory is full: {size(work.step.weight_bytes)} needed, {size(max(rooms[name], 0))} left"
        )
    tokens, keys = plan.typical
    tokens = work.step.tokens or tokens
    if tokens < device.least:
        return Offer(name, None, f"{tokens} tokens per call; it takes {device.least} and more")
    found = device.predict(work, tokens, keys)
    cpu = cost.predict(plan, work.step, rates)
    if policy == "fixed" or found is None or cpu is None:
        return Offer(name, device, device.label, device.least, found[0] if found else None)
    us, source = found
    against = f"{us / 1e3:.2f} ms, cpu {cpu / 1e3:.2f} at {tokens} tokens ({source}; cpu {rates.source})"
    if tokens > cost.FEW and (hidden := _cpu_us(meanwhile, tokens, keys, plan, rates)):
        against += f", of which {min(hidden, us) / 1e3:.2f} ms run beside the CPU's work"
    least = _wins_from(device, work, plan, MARGINS[policy], rates, meanwhile)
    if not least:
        verdict = f"loses {(us - cpu) / 1e3:.2f} ms" if us >= cpu else f"gains only {(cpu - us) / 1e3:.2f} ms"
        return Offer(name, None, f"{verdict}: {against}", us=us)
    return Offer(name, device, f"{device.label}; {f'from {least} tokens on; ' * (least > 1)}{against}", least, us)


def _cpu_us(steps: Sequence[Step], tokens: int, keys: int, plan: Plan, rates: Rates) -> float:
    """Predicted for all of them, one after another."""
    cached = cost.is_cached(plan)
    return sum(cost.microseconds(s, s.tokens or tokens, max(keys, tokens), rates, cached) or 0.0 for s in steps)


def _wins_from(
    device: Device, work: Work, plan: Plan, margin: float, rates: Rates, meanwhile: Sequence[Step] = ()
) -> int:
    """The least number of tokens from which the device always wins; 0 if there is none."""
    tokens, keys = plan.typical
    fixed = work.step.tokens or (tokens if plan.tokens.isdigit() else 0)
    least = 0
    for count in [fixed] if fixed else [t for t in PROMPTS if t >= device.least]:
        cpu = cost.microseconds(work.step, count, max(keys, count), rates, cost.is_cached(plan))
        found = device.predict(work, count, max(keys, count))
        hidden = _cpu_us(meanwhile, count, keys, plan, rates) if count > cost.FEW else 0.0
        wins = cpu is not None and found is not None and max(found[0] - hidden, 0.0) < margin * cpu
        least = (least or count) if wins else 0
    return least


def _room(device: Device) -> float:
    """Bytes of weights that a device can hold; no limit where it names none."""
    memory = device.memory()
    return memory.budget + max(memory.used, memory.shared) if memory.budget else math.inf


def _nodes(gm: GraphModule) -> list[Node]:
    """The nodes behind a plan's steps, in their order."""
    return [node for node in gm.graph.nodes if node.op == "call_function" and node.target in OPS]


def _work(node: Node, step: Step) -> Work:
    """`node` may come from the compile cache: it has no `meta`."""
    names = [argument.name for argument in node.target._schema.arguments]
    constants = {n: v for n, v in zip(names, node.args, strict=True) if not _has_node(v)}
    _, positions = OPS[node.target]
    weights = [weight for position in positions for weight in node.args[position]]
    whole = all(weight.op == "placeholder" for weight in weights)
    return Work(step, constants, whole)


def _has_node(value: Any) -> bool:
    return isinstance(value, Node) or (isinstance(value, Sequence) and any(isinstance(v, Node) for v in value))


def _note(plan: Plan, gm: GraphModule, apart: Mapping[Node, branches.Span]) -> None:
    """Write into the plan what runs beside what, and the order in which results are there."""
    nodes = _nodes(gm)
    place = {node: index for index, node in enumerate(gm.graph.nodes)}
    ends = [place[apart[node].end] - 0.5 if node in apart else place[node] for node in nodes]
    plan.order = sorted(range(len(nodes)), key=ends.__getitem__) if apart else []
    for index, (node, step) in enumerate(zip(nodes, plan.steps, strict=True)):
        if node in apart:
            beside = ", ".join(apart[node].beside)
            plan.steps[index] = dataclasses.replace(step, reason=f"{step.reason}; beside {beside}")


def _with_calls(
    gm: GraphModule, chosen: Mapping[Node, placed.Site], apart: Mapping[Node, branches.Span]
) -> GraphModule:
    graph = Graph()
    copies: dict[Node, Node] = {}
    tickets: dict[Node, Node] = {}
    starts: dict[Node, list[Node]] = {}
    ends: dict[Node, list[Node]] = {}
    for node, span in apart.items():
        starts.setdefault(span.start, []).append(node)
        ends.setdefault(span.end, []).append(node)

    def call(node: Node, form: str, *more: Node) -> Node:
        target = placed.placed_op(chosen[node].op, form)
        arguments = [*node.args[:-1], None] if form == "start" else node.args
        copied = torch.fx.map_arg(tuple(arguments), copies.__getitem__)
        return graph.call_function(target, (*copied, *more, chosen[node].number))

    for node in gm.graph.nodes:
        for ended in ends.get(node, ()):
            copies[ended] = call(ended, "finish", tickets[ended])
        if node not in chosen:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        elif node not in apart:
            copies[node] = call(node, "placed")
        for begun in starts.get(node, ()):
            tickets[begun] = call(begun, "start")
    return GraphModule(gm, graph)
