"""Regions -> `unicorn::` ops in the graph. The ordered list of passes is `rewrite`."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from unicorn_backend.graph.attention import find_attention, find_qkv
from unicorn_backend.graph.ffn import find_ffn
from unicorn_backend.graph.norm import fuse_rms_norm
from unicorn_backend.graph.pattern import (
    Linear,
    Norm,
    Reason,
    Tail,
    as_linear,
    aten,
    is_op,
    last_of,
    ordering,
    same_shape,
    shape,
    static,
    unicorn,
    value,
)
from unicorn_backend.graph.region import Attention, Ffn, Match, Qkv, bias_argument, weight_arguments
from unicorn_backend.graph.tables import fuse_tables

REPLACED_BY = "unicorn_replaced_by"


def rewrite(gm: GraphModule) -> Match:
    """Run every pass on a normalised graph, in place. Returns the regions taken and the reasons.

    The order matters: norms become one node first, so that the patterns see them as such; a
    feed-forward absorbs its norm and residual before attention looks at what is left.
    """
    drop_no_ops(gm)
    fuse_rms_norm(gm)
    taken = Match()
    ffn = find_ffn(gm.graph)
    attention = find_attention(gm.graph)
    qkv = find_qkv(gm.graph, attention.regions)
    for match in (ffn, attention, qkv):
        taken.reasons += match.reasons
    for region, place in [(r, _place_ffn) for r in ffn.regions] + [(r, _place_attention) for r in attention.regions]:
        _try(gm, region, place, taken)
    for region in qkv.regions:
        _try(gm, region, _place_qkv, taken)
    fuse_tables(gm)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return taken


def drop_no_ops(gm: GraphModule) -> int:
    """Take out what does nothing at inference: dropout, detach, alias, slices of everything, grad mode."""
    count = 0
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is torch._C._set_grad_enabled:
            gm.graph.erase_node(node)
            count += 1
        elif _is_no_op(node):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
            count += 1
    return count


def _is_no_op(node: Node) -> bool:
    if is_op(node, aten.dropout.default):
        return node.args[2] is False or node.args[1] == 0.0
    if is_op(node, aten.detach.default, aten.alias.default, aten.lift_fresh.default):
        return isinstance(node.args[0], Node)
    if is_op(node, aten.to.dtype, aten.to.device, aten.type_as.default):
        before, after = value(node.args[0]), value(node)
        copy = node.kwargs or any(arg is True for arg in node.args)
        return not copy and (before.dtype, before.device) == (after.dtype, after.device)
    if is_op(node, aten.expand.default):
        return same_shape(node, node.args[0])
    if is_op(node, aten.slice.Tensor):
        given: tuple[Any, ...] = tuple(node.args[2:])
        first, last, step = given + (None, None, 1)[len(given) :]
        return first in (0, None) and step == 1 and _is_end(last) and same_shape(node, node.args[0])
    return False


def _is_end(last: Any) -> bool:
    return last is None or (isinstance(last, int) and last >= 2**31)


def _try(gm: GraphModule, region: Any, place: Any, taken: Match) -> None:
    reason = place(gm, region)
    if reason is None:
        taken.regions.append(region)
    else:
        taken.reasons.append(Reason(region.kind, region.linears[0].node.name, reason))


def _norm_args(norm: Norm | None) -> tuple[Node | None, float | None, float]:
    return (None, None, 0.0) if norm is None else (norm.w, norm.eps, norm.offset)


def _tail_args(tail: Tail) -> tuple[Any, ...]:
    return (*_norm_args(tail.norm), tail.residual)


def _emit(gm: GraphModule, op: Any, args: Sequence[Any]) -> Node:
    return gm.graph.call_function(op, map_arg(tuple(args), _current))


def _current(node: Node) -> Node:
    """The node that stands for `node` now: regions were matched before others were replaced."""
    while (newer := node.meta.get(REPLACED_BY)) is not None:
        node = newer
    return node


def _replace(old: Node, new: Node) -> None:
    new.meta["val"] = value(old)
    old.replace_all_uses_with(new)
    old.meta[REPLACED_BY] = new


def _place_ffn(gm: GraphModule, ffn: Ffn) -> str | None:
    x = ffn.norm.x if ffn.norm else ffn.gate.x
    with gm.graph.inserting_before(ffn.tail.out):
        weights = [weight_arguments(gm, linear) for linear in ffn.linears]
        biases = [b for linear in ffn.linears if (b := bias_argument(gm, linear)) is not None]
        args = (x, *_norm_args(ffn.norm), *weights, biases, ffn.act, ffn.gate.n, ffn.down.n, *_tail_args(ffn.tail))
        if ffn.cutoff is None:
            fused = _emit(gm, unicorn.int4_ffn.default, args)
        else:
            fused = _emit(gm, unicorn.sparse_ffn.default, (*args, ffn.cutoff))
    _replace(ffn.tail.out, fused)
    return None


def _place_attention(gm: GraphModule, att: Attention) -> str | None:
    with gm.graph.inserting_before(att.tail.out):
        wo = weight_arguments(gm, att.out)
        args = (att.q, att.k, att.v, att.mask, att.causal, att.scale, att.softcap, wo, att.out.bias, att.out.n)
        fused = _emit(gm, unicorn.int8_attention.default, (*args, *_tail_args(att.tail)))
    _replace(att.tail.out, fused)
    return None


def _place_qkv(gm: GraphModule, qkv: Qkv) -> str | None:
    """One op for the three projections, where all it needs exists before its first reader."""
    order = ordering(gm.graph)
    x = qkv.norm.x if qkv.norm else qkv.q.x
    norms = [norm.w for norm in (qkv.norm, qkv.q_norm, qkv.k_norm) if norm and norm.w is not None]
    weights = [w for linear in qkv.linears for w in linear.weights]
    biases = [linear.bias for linear in qkv.linears if linear.bias is not None]
    tables = () if qkv.rotation is None else qkv.rotation.tables[:2]
    needed = [_current(n) for n in (x, *tables, *norms, *weights, *biases)]
    after = last_of(needed, order)
    readers = [user for head in qkv.heads for user in head.users]
    if any(order[reader] <= order[after] for reader in readers):
        return "something reads the query, key or value before the rotary tables exist"
    last_placeholder = last_of((n for n in gm.graph.nodes if n.op == "placeholder"), order)
    with gm.graph.inserting_after(last_of((after, last_placeholder), order)):
        anchor = gm.graph.call_function(operator.add, (0, 0))
    with gm.graph.inserting_before(anchor):
        outputs = _emit_qkv(gm, qkv, x)
    gm.graph.erase_node(anchor)
    for head, output in zip(qkv.heads, outputs, strict=True):
        _replace(head, output)
    return None


def _emit_qkv(gm: GraphModule, qkv: Qkv, x: Node) -> list[Node]:
    weights = [weight_arguments(gm, linear) for linear in qkv.linears]
    biases = [b for linear in qkv.linears if (b := bias_argument(gm, linear)) is not None]
    q_norm, k_norm = _norm_args(qkv.q_norm), _norm_args(qkv.k_norm)
    heads, kv_heads, width = (static(shape(qkv.heads[i])[d]) for i, d in ((0, 1), (1, 1), (0, 3)))
    args = (x, *_norm_args(qkv.norm), *weights, biases, q_norm[0], k_norm[0], *q_norm[1:])
    cos, sin, interleaved = (None, None, False) if qkv.rotation is None else qkv.rotation.tables
    tables = [_table(gm, table) for table in (cos, sin)]
    fused = _emit(gm, unicorn.int8_qkv.default, (*args, *tables, heads, kv_heads, width, interleaved, qkv.v_norm))
    return [gm.graph.call_function(operator.getitem, (fused, i)) for i in range(3)]


def _table(gm: GraphModule, table: Node | None) -> Node | None:
    """cos or sin as [B or 1, T, width]; what broadcasts over heads loses that dimension."""
    if table is None or len(shape(table)) == 3:
        return table
    heads = next(dim for dim in (1, 2) if static(shape(table)[dim]) == 1)
    flat = gm.graph.call_function(aten.squeeze.dim, (_current(table), heads))
    flat.meta["val"] = value(table).squeeze(heads)
    return flat


def count_linears(gm: GraphModule) -> list[Linear]:
    """Projections that stayed outside every region (final head, adapters, vision tower, ...)."""
    return [linear for node in gm.graph.nodes if (linear := as_linear(node)) is not None and linear.rows is None]
