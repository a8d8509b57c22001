"""Attention: from `scaled_dot_product_attention`, or the softmax of eager attention, both ways.

Forward to the output projection, post-norm and residual add (`unicorn::int8_attention`), back to the
query/key/value projections, q/k norm and rotary embedding (`unicorn::int8_qkv`). Between the two
stays whatever updates the KV cache, so every cache class works.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from unicorn_backend.graph.ffn import whole_of
from unicorn_backend.graph.pattern import (
    CASTS,
    COPIES,
    SPLITS,
    TRANSPOSES,
    VIEWS,
    Linear,
    Norm,
    Reason,
    as_linear,
    as_norm,
    aten,
    is_op,
    only_user,
    operands,
    row_range,
    same_size,
    shape,
    static,
    strip,
    tail_of,
    value,
)
from unicorn_backend.graph.region import Attention, Match, Qkv, rows_fit
from unicorn_backend.graph.rotary import Rotation, as_rotation, rotation_of

_ROWS = torch.ops.unicorn.dequantize_rows.default
SDPA = aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class _Core:
    """The attention proper: softmax(softcap(q k^T * scale) + mask) v, giving [B, H, T, Dv]."""

    node: Node
    q: Node
    k: Node
    v: Node
    mask: Node | None
    causal: bool
    scale: float
    softcap: float


def find_attention(graph: Graph) -> Match:
    """Every attention of the graph (its output side), and a reason for each one left."""
    match = Match()
    for node in graph.nodes:
        core: _Core | str | None
        if is_op(node, SDPA):
            core = _sdpa(node)
        elif is_op(node, aten.softmax.int, aten._softmax.default):
            core = _eager(node)
        else:
            continue
        found = _output_side(core) if isinstance(core, _Core) else core
        if isinstance(found, Attention):
            match.regions.append(found)
        elif found is not None:
            match.reasons.append(Reason("attention", node.name, found))
    return match


def find_qkv(graph: Graph, attentions: list[Attention]) -> Match:
    """The projections in front of each attention, and a reason where they are not fused."""
    match = Match()
    for attention in attentions:
        found = _input_side(attention)
        if isinstance(found, Qkv):
            match.regions.append(found)
        else:
            match.reasons.append(Reason("qkv", attention.anchor.name, found))
    return match


# --- the core ---------------------------------------------------------------------------------


def _sdpa(node: Node) -> _Core | str:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    q, k, v = given["query"], given["key"], given["value"]
    if given.get("dropout_p", 0.0) != 0.0:
        return "dropout is on"
    if len(shape(q)) != 4:
        return f"query has {len(shape(q))} dimensions, not 4"
    width = static(shape(q)[-1])
    scale = given.get("scale")
    if width is None or not (scale is None or isinstance(scale, float)):
        return "head width or scale is not known at compile time"
    causal = bool(given.get("is_causal", False))
    if causal and not same_size(shape(q)[2], shape(k)[2]):
        return "is_causal with more keys than queries (torch aligns it top left, our kernels bottom right)"
    scale = 1.0 / math.sqrt(width) if scale is None else scale
    k, v = _stored(k, v)
    return _Core(node, q, k, v, given.get("attn_mask"), causal, scale, 0.0)


def _eager(softmax: Node) -> _Core | str | None:
    """`matmul(softmax(matmul(q, k^T) * scale [softcap] [+ mask]), v)`; None if it is no attention."""
    logits = softmax.args[0]
    if len(shape(logits)) != 4 or softmax.args[1] not in (-1, 3):
        return None
    weights = softmax
    while (user := only_user(weights)) is not None and is_op(user, *CASTS, *COPIES, aten.dropout.default):
        weights = user
    if user is None or not is_op(user, aten.matmul.default) or user.args[0] is not weights:
        return "the softmax does not go straight into a product with the values"
    logits = strip(logits, *CASTS)
    mask = None
    product = _scores(logits)
    if product is None and is_op(logits, aten.add.Tensor):
        found = operands(logits, lambda one: _scores(strip(one, *CASTS)) if isinstance(one, Node) else None)
        if found is not None and isinstance(found[1], Node):
            product, mask = found
    if product is None:
        return "the logits are not a scaled product of queries and keys plus a mask"
    q, k, scale, softcap = product
    q, k = (strip(one, *CASTS) for one in (q, k))  # the op computes in fp32 itself
    k, v = _stored(k, user.args[1])
    return _Core(user, q, k, v, mask, False, scale, softcap)


def _scores(node: Node) -> tuple[Node, Node, float, float] | None:
    """(q, k, scale, softcap) of `softcap * tanh(q k^T * scale / softcap)` or plain `q k^T * scale`."""
    capped = _number_factor(node)
    if capped is not None and is_op(capped[0], aten.tanh.default):
        inner, softcap = capped[0].args[0], capped[1]
        divided = _number_factor(inner)
        if divided is None or not math.isclose(divided[1] * softcap, 1.0, rel_tol=1e-6):
            return None
        plain = _scores(strip(divided[0], *CASTS))
        return None if plain is None or plain[3] else (*plain[:3], softcap)
    scaled = capped or (node, 1.0)
    product = strip(scaled[0], *CASTS)
    if not is_op(product, aten.matmul.default):
        return None
    q, key = product.args
    key_t = strip(key, *COPIES)
    if not is_op(key_t, aten.transpose.int) or set(d % 4 for d in key_t.args[1:3]) != {2, 3}:
        return None
    return q, key_t.args[0], scaled[1], 0.0


def _number_factor(node: Node) -> tuple[Node, float] | None:
    """(x, factor) if `node` is `x * number` or `x / number`."""
    if is_op(node, aten.mul.Tensor, aten.mul.Scalar):
        found = operands(node, lambda one: float(one) if isinstance(one, (int, float)) else None)
        return None if found is None or not isinstance(found[1], Node) else (found[1], found[0])
    if is_op(node, aten.div.Tensor, aten.div.Scalar) and isinstance(node.args[1], (int, float)):
        return node.args[0], 1.0 / node.args[1]
    return None


def _stored(k: Node, v: Node) -> tuple[Node, Node]:
    """K and V with their own number of heads, and as int8 rows if that is what a cache holds."""
    k, v = _unrepeat(k), _unrepeat(v)
    if is_op(k, _ROWS) and is_op(v, _ROWS):
        return k.args[0], v.args[0]
    return k, v


def _unrepeat(node: Node) -> Node:
    """Take off `repeat_kv`: expand of KV heads to query heads (our kernels do GQA themselves)."""
    inner = strip(node, *COPIES)
    if is_op(inner, *VIEWS) and is_op(inner.args[0], aten.expand.default) and len(shape(inner)) == 4:
        source = inner.args[0].args[0]
        if len(shape(source)) == 5 and static(shape(source)[2]) == 1:
            while is_op(source, aten.slice.Tensor):
                source = source.args[0]
            if is_op(source, aten.unsqueeze.default) and source.args[1] in (2, -3) and len(shape(source.args[0])) == 4:
                return source.args[0]
    if is_op(inner, aten.repeat_interleave.self_int) and inner.args[2] == 1:
        return inner.args[0]
    return node


# --- output side ------------------------------------------------------------------------------


def _output_side(core: _Core) -> Attention | str:
    """Heads back to [B, T, H * Dv], the projection, post-norm and residual add."""
    node, swaps = core.node, 0
    while (user := only_user(node)) is not None and is_op(user, *VIEWS, *TRANSPOSES, *COPIES):
        swaps += is_op(user, *TRANSPOSES)
        node = user
    out = as_linear(user) if user is not None else None
    if out is None or out.x is not node or out.rows is not None:
        name = "several nodes" if user is None else str(user.target)
        return f"its output goes into {name}, not straight into one projection"
    b, h, t, d = shape(core.node)
    expected = (b, t, h * d)
    joined = len(shape(node)) == 3 and all(same_size(x, y) for x, y in zip(shape(node), expected, strict=True))
    if swaps != 1 or not joined:
        return "its heads are not joined as [B, T, H * D]"
    if bad := _bad_heads(core):
        return bad
    dropout = only_user(out.node)
    last = dropout if dropout is not None and is_op(dropout, aten.dropout.default) else out.node
    tail = tail_of(last)
    return Attention(core.node, core.q, core.k, core.v, core.mask, core.causal, core.scale, core.softcap, out, tail)


def _bad_heads(core: _Core) -> str | None:
    heads, kv_heads = static(shape(core.q)[1]), static(shape(core.k)[1])
    if heads is None or kv_heads is None or heads % kv_heads or static(shape(core.v)[1]) != kv_heads:
        return f"{heads} query heads do not divide over {kv_heads} key and {shape(core.v)[1]} value heads"
    dtypes = [value(one).dtype for one in (core.q, core.k, core.v)]
    if len(set(dtypes)) > 1 and dtypes[1:] != [torch.int8] * 2:
        return f"query, key and value differ in dtype: {', '.join(map(str, dtypes))}"
    if core.mask is not None and len(shape(core.mask)) not in (2, 3, 4):
        return f"mask has {len(shape(core.mask))} dimensions"
    return None


# --- input side -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Head:
    """One projection up to heads [B, H, T, D], with the norm and rotary embedding after it."""

    linear: Linear
    node: Node
    norm: Norm | None
    rotation: Rotation | None

    @property
    def tables(self) -> tuple[Node, Node, bool] | None:
        """What the heads of one attention must share."""
        return None if self.rotation is None else self.rotation.tables


def _input_side(attention: Attention) -> Qkv | str:
    query = _back_to_projection(attention.q)
    if isinstance(query, str):
        return query
    x = query.linear.x
    if len(shape(x)) != 3:
        return f"the projections read a tensor of {len(shape(x))} dimensions, not [B, T, K]"
    projections = _projections(x)
    if projections == [query.linear]:
        return "keys and values are another layer's: only the query is projected here"
    others = [h for h in map(_forward_to_heads, projections) if h is not None]
    others = [h for h in others if h.linear != query.linear and same_size(shape(h.node)[3], shape(query.node)[3])]
    if len(others) != 2:
        return f"{len(others)} projections beside the query read its input, 2 are needed (key, value)"
    key, val = sorted(others, key=lambda h: (h.rotation is None, h.norm is None or h.norm.w is None))
    if key.tables != query.tables or val.rotation is not None:
        return "query and key are not rotated alike, or the value is rotated"
    return _check_qkv(query, key, val)


def _check_qkv(query: _Head, key: _Head, val: _Head) -> Qkv | str:
    norms = (query.norm, key.norm)
    if any(norm is not None and norm.w is None for norm in norms):
        return "the norm of query or key has no weight"
    if (norms[0] is None) != (norms[1] is None):
        return "only one of query and key has a norm"
    if norms[0] and norms[1] and (norms[0].eps, norms[0].offset) != (norms[1].eps, norms[1].offset):
        return "the norms of query and key differ in eps or offset"
    if val.norm and (val.norm.w is not None or norms[0] is None or norms[0].eps != val.norm.eps):
        return "the norm of the value has a weight, or another eps than those of query and key"
    linears = (query.linear, key.linear, val.linear)
    if not all(map(rows_fit, linears)):
        return "query, key and value share one packed weight and do not split at multiples of 16 rows"
    if len({linear.bias is None for linear in linears}) != 1:
        return "some but not all of query, key and value have a bias"
    norm = as_norm(query.linear.x)
    readers = {whole_of(linear) for linear in linears}
    if norm is not None and not set(norm.node.users) <= readers:
        norm = None
    heads = (query.node, key.node, val.node)
    return Qkv(*linears, heads, norm, query.norm, key.norm, val.norm is not None, query.rotation)


def _projections(x: Node) -> list[Linear]:
    """Every projection (or row range of one) that reads `x`."""
    found = []
    for user in x.users:
        linear = as_linear(user)
        if linear is None or linear.x is not x:
            continue
        parts = _row_ranges(user)
        found += parts or [linear]
    return found


def _row_ranges(node: Node) -> list[Linear]:
    """The parts into which all users cut `node` along its last dimension; [] if it is used whole."""
    parts: list[Linear] = []
    for user in node.users:
        cuts = list(user.users) if is_op(user, *SPLITS) else [user]
        for cut in cuts:
            part = as_linear(cut) if row_range(cut) is not None else None
            if part is None:
                return []
            parts.append(part)
    return parts


def _forward_to_heads(linear: Linear) -> _Head | None:
    """`linear` -> view [B, T, H, D] -> transpose(1, 2), with norm over D and then rotary on either side of it."""
    view = only_user(linear.node)
    if view is None or not is_op(view, *VIEWS) or len(shape(view)) != 4 or static(shape(view)[3]) is None:
        return None
    norm, turn, node = _norm_and_rotation(view, None, None, heads=2)
    swapped = only_user(node)
    if swapped is None or not is_op(swapped, aten.transpose.int) or {d % 4 for d in swapped.args[1:3]} != {1, 2}:
        return None
    norm, turn, node = _norm_and_rotation(swapped, norm, turn, heads=1)
    return _Head(linear, node, norm, turn)


def _norm_and_rotation(
    node: Node, norm: Norm | None, turn: Rotation | None, heads: int
) -> tuple[Norm | None, Rotation | None, Node]:
    """What of the two is still missing, if it is all that reads `node`, and the last node of it."""
    user = only_user(node)
    if norm is None and turn is None and user is not None and (norm := as_norm(user)) is not None:
        node = norm.node
    if turn is None and (found := rotation_of(node)) is not None and heads in found.heads:
        turn, node = found, found.out
    return norm, turn, node


def _unscaled(q: Node) -> Node:
    """What a number per token multiplies, if `q` [B, H, T, D] is such a product (Ministral 3), which stays as it is."""
    if is_op(q, aten.mul.Tensor) and all(isinstance(factor, Node) for factor in q.args):
        for x, scale in (q.args, q.args[::-1]):
            sizes = shape(scale)
            if len(sizes) == 4 and static(sizes[1]) == static(sizes[3]) == 1 and len(shape(x)) == 4:
                return x
    return q


def _back_to_projection(q: Node) -> _Head | str:
    """From the query that attention reads back to its projection."""
    node = inner = strip(_unscaled(strip(q, *COPIES)), *COPIES)
    while not is_op(inner, *VIEWS):
        turn, norm = as_rotation(inner), as_norm(inner)
        if turn is None and norm is None and not is_op(inner, aten.transpose.int):
            return (
                f"the query comes from {getattr(inner, 'target', inner)}, not from a norm or rotary embedding we know"
            )
        inner = turn.x if turn else norm.x if norm else inner.args[0]
    linear = as_linear(inner.args[0])
    found = _forward_to_heads(linear) if linear is not None else None
    if found is None or found.node is not node:
        return "the query is not a projection with optional norm and then rotary embedding per head"
    return found
