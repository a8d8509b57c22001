"""Gated feed-forward: `down(act(gate(x)) * up(x))` -> `unicorn::int4_ffn`.

Anchor: the activation. GeGLU (tanh or erf GELU), SwiGLU and ReGLU; gate and up may be two linears
or two halves of one (Phi-3). A gate that is cut to
what it is above mean + cutoff * standard deviation (Gemma 3n) makes it `unicorn::sparse_ffn`.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

from unicorn_backend.graph.pattern import (
    CASTS,
    COPIES,
    Linear,
    Norm,
    Reason,
    as_linear,
    as_norm,
    aten,
    is_op,
    number,
    only_user,
    strip,
    tail_of,
)
from unicorn_backend.graph.region import TILE_ROWS, Ffn, Match, rows_fit


def find_ffn(graph: Graph) -> Match:
    """Every gated feed-forward of the graph, and a reason for every gate-like activation left."""
    match = Match()
    for node in graph.nodes:
        act = activation(node)
        if act is None:
            continue
        found = _match(node, act)
        if isinstance(found, Ffn):
            match.regions.append(found)
        elif found is not None:
            match.reasons.append(Reason("ffn", node.name, found))
    return match


def activation(node: Node) -> str | None:
    """Name of the activation that `node` computes, as `int4_ffn` spells it."""
    if is_op(node, aten.gelu.default):
        return "gelu_tanh" if node.kwargs.get("approximate", "none") == "tanh" else "gelu"
    if is_op(node, aten.silu.default):
        return "silu"
    return "relu" if is_op(node, aten.relu.default) else None


def _match(node: Node, act: str) -> Ffn | str | None:
    """An `Ffn`, a reason, or None where nothing here looks like a feed-forward."""
    inner, cutoff = _uncut(strip(node.args[0], *COPIES))
    gate = as_linear(inner)
    if gate is None:
        return None
    if cutoff is not None and gate.n % TILE_ROWS:
        return f"the gate is cut off and its width {gate.n} is no multiple of {TILE_ROWS}"
    product = only_user(node)
    if product is None or not is_op(product, aten.mul.Tensor):
        return f"the {act} of a projection is not multiplied by a second projection (not gated)"
    other = product.args[1] if product.args[0] is node else product.args[0]
    up = as_linear(strip(other, *COPIES)) if isinstance(other, Node) else None
    if up is None or up.x is not gate.x:
        return "the gate's factor is not a projection of the same input"
    inner = product
    while (user := only_user(inner)) is not None and is_op(user, *COPIES, *CASTS):
        inner = user
    down = as_linear(user) if user is not None else None
    if down is None or down.x is not inner or down.rows is not None:
        return "the gated product does not go straight into one projection"
    return _build(gate, up, down, act, cutoff)


def _uncut(node: Node) -> tuple[Node, float | None]:
    """(g, cutoff) if `node` is relu(g - (mean(g) + std(g) * cutoff)) over the last dimension; else (node, None)."""
    difference: Any = node.args[0] if is_op(node, aten.relu.default) else None
    if not is_op(difference, aten.sub.Tensor) or not is_op(difference.args[1], aten.add.Tensor):
        return node, None
    if difference.kwargs or difference.args[1].kwargs:  # alpha: multiples
        return node, None
    gate, (mean, spread) = difference.args[0], difference.args[1].args
    if not is_op(spread, aten.mul.Tensor):
        mean, spread = spread, mean
    if not is_op(mean, aten.mean.dim) or not is_op(spread, aten.mul.Tensor):
        return node, None
    std, factor = spread.args
    if not is_op(std, aten.std.dim):
        std, factor = factor, std
    if not is_op(std, aten.std.dim) or mean.args[:3] != (gate, [-1], True) or std.args != (gate, [-1], False, True):
        return node, None
    cutoff = number(factor)
    return (node, None) if cutoff is None else (gate, cutoff)


def _build(gate: Linear, up: Linear, down: Linear, act: str, cutoff: float | None) -> Ffn | str:
    if gate.n != up.n:
        return f"gate and up differ in width: {gate.n} and {up.n}"
    if not (rows_fit(gate) and rows_fit(up)):
        return "gate and up share one packed weight and do not split at a multiple of 16 rows"
    biases = [linear.bias is not None for linear in (gate, up, down)]
    if any(biases) and not all(biases):
        return "some but not all of gate, up and down have a bias"
    return Ffn(gate, up, down, act, _own_norm(gate, up), tail_of(down.node), cutoff)


def _own_norm(gate: Linear, up: Linear) -> Norm | None:
    """The norm in front, if gate and up are its only readers (else others need its output)."""
    norm = as_norm(gate.x)
    readers = {whole_of(gate), whole_of(up)}
    return norm if norm is not None and set(norm.node.users) <= readers else None


def whole_of(linear: Linear) -> Node:
    """The node of the whole projection that a row range was cut from."""
    node = linear.node
    while linear.rows is not None and as_linear_node(node) is None:
        node = node.args[0]
    return node


def as_linear_node(node: Node) -> Node | None:
    linear = as_linear(node)
    return node if linear is not None and linear.rows is None else None
