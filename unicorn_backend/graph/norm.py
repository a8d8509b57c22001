"""RMS norm in its usual spellings -> `unicorn::rms_norm`.

`x * rsqrt(mean(x^2, -1) + eps)`, with an optional weight `w` or `1 + w`, and casts to fp32 and back
anywhere. Gemma multiplies by `1 + w` in fp32 and casts last; Llama casts first and multiplies by
`w` in the model's dtype, which differs from our op by one rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from unicorn_backend.graph.pattern import CASTS, aten, is_op, operands, shape, static, strip, unicorn, value


def fuse_rms_norm(gm: GraphModule) -> int:
    """Replace every RMS norm that has a known width by one op. Returns how many."""
    count = 0
    for node in list(gm.graph.nodes):
        if not is_op(node, aten.mul.Tensor):
            continue
        found = _with_weight(node) or _without_weight(node)
        if found is None:
            continue
        x, w, eps, offset = found
        out = _cast_back(node, x)
        if out is None or not _unread(node, out):
            continue
        with gm.graph.inserting_before(out):
            fused = gm.graph.call_function(unicorn.rms_norm.default, (x, w, eps, offset))
        fused.meta["val"] = value(out)
        out.replace_all_uses_with(fused)
        count += 1
    gm.graph.eliminate_dead_code()
    return count


def _with_weight(node: Node) -> tuple[Node, Node, float, float] | None:
    """`normalised * w` or `normalised * (1 + w)`."""
    found = operands(node, _weight)
    if found is None or not isinstance(found[1], Node):
        return None
    (w, offset), core = found
    inner = strip(core, *CASTS)
    normalised = _core(inner)
    if normalised is None or not _matches_width(w, normalised[0]):
        return None
    return normalised[0], w, normalised[1], offset


def _weight(node: Any) -> tuple[Node, float] | None:
    """A 1-D graph input, plain or with 1 added."""
    if is_op(node, aten.add.Tensor):
        found = operands(node, lambda one: True if isinstance(one, (int, float)) and one == 1 else None)
        if found is None or not isinstance(found[1], Node):
            return None
        inner, offset = strip(found[1], *CASTS), 1.0
    elif isinstance(node, Node):
        inner, offset = strip(node, *CASTS), 0.0
    else:
        return None
    return (inner, offset) if inner.op in ("placeholder", "get_attr") and len(shape(inner)) == 1 else None


def _without_weight(node: Node) -> tuple[Node, None, float, float] | None:
    core = _core(node)
    if core is None or any(_with_weight(user) for user in _through_casts(node) if is_op(user, aten.mul.Tensor)):
        return None
    return core[0], None, core[1], 0.0


def _core(node: Node) -> tuple[Node, float] | None:
    """(x, eps) if `node` is `x * rsqrt(mean(x^2) + eps)`."""
    if not is_op(node, aten.mul.Tensor):
        return None
    found = operands(node, _inverse_rms)
    if found is None or not isinstance(found[1], Node):
        return None
    (squared, eps), x = found
    if strip(squared, *CASTS) is not strip(x, *CASTS) or static(shape(x)[-1]) is None:
        return None
    return strip(x, *CASTS), eps


def _inverse_rms(node: Any) -> tuple[Node, float] | None:
    """(x, eps) if `node` is `rsqrt(mean(x^2, -1, keepdim) + eps)` in any of its spellings."""
    if is_op(node, aten.rsqrt.default) or (is_op(node, aten.pow.Tensor_Scalar) and node.args[1] == -0.5):
        total = node.args[0]
    elif is_op(node, aten.reciprocal.default) and is_op(node.args[0], aten.sqrt.default):
        total = node.args[0].args[0]
    else:
        return None
    if not is_op(total, aten.add.Tensor):
        return None
    mean, eps = total.args[0], total.args[1]
    if not isinstance(eps, float):
        mean, eps = eps, mean
    if not isinstance(eps, float) or not is_op(mean, aten.mean.dim):
        return None
    square, dims, keep = (*mean.args, False)[:3]
    rank = len(shape(mean.args[0]))
    if list(dims) not in ([-1], [rank - 1]) or not keep:
        return None
    if is_op(square, aten.pow.Tensor_Scalar) and square.args[1] == 2:
        return square.args[0], eps
    if is_op(square, aten.mul.Tensor) and square.args[0] is square.args[1]:
        return square.args[0], eps
    return None


def _matches_width(w: Node, x: Node) -> bool:
    return static(shape(w)[0]) is not None and shape(w)[0] == shape(x)[-1]


def _through_casts(node: Node) -> list[Node]:
    """Users of `node`, seen through casts."""
    found: list[Node] = []
    for user in node.users:
        found += _through_casts(user) if is_op(user, *CASTS) else [user]
    return found


def _cast_back(node: Node, x: Node) -> Node | None:
    """The node at which the norm has the dtype of x again: `node` itself or a cast after it."""
    dtype = value(x).dtype
    if value(node).dtype == dtype:
        return node
    for user in node.users:
        if is_op(user, *CASTS) and value(user).dtype == dtype:
            return user
    return None


def _unread(node: Node, out: Node) -> bool:
    """True if only `out` reads `node`, so that nothing else needs the unrounded value."""
    return node is out or all(user is out for user in node.users) or value(node).dtype != torch.float32
