"""Rotary embedding in its usual spellings: `x * cos + swap(x) * sin`.

Over the whole head width or its first part, with pairs half the width apart (Llama) or neighbours (GLM, Cohere), before
or after the heads are transposed, with casts to fp32 and back anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from unicorn_backend.graph.pattern import (
    CASTS,
    COPIES,
    SPLITS,
    VIEWS,
    aten,
    is_op,
    node_is_getitem,
    operands,
    row_range,
    same_size,
    shape,
    static,
    strip,
    value,
)

_JOINS = (*VIEWS, aten.flatten.using_ints)
_INSIDE = (
    *CASTS,
    *COPIES,
    *SPLITS,
    *_JOINS,
    aten.mul.Tensor,
    aten.slice.Tensor,
    aten.neg.default,
    aten.cat.default,
    aten.stack.default,
    aten.add.Tensor,
    aten.unsqueeze.default,
)


@dataclass(frozen=True)
class Rotation:
    """`out` is `x` with the first `width` elements of each head rotated; cos and sin broadcast over the heads."""

    out: Node
    x: Node
    cos: Node  # [B or 1, 1, T, width], or with the two in the middle exchanged, as x has them
    sin: Node
    interleaved: bool
    heads: tuple[int, ...]  # dimensions of x that can be its heads: 1 or 2, or both where both are of size 1

    @property
    def tables(self) -> tuple[Node, Node, bool]:
        """cos, sin and the kind of pairs, before cos and sin are made to broadcast: equal where rotations are."""
        return _unbroadcast(self.cos), _unbroadcast(self.sin), self.interleaved


def _unbroadcast(table: Node) -> Node:
    unsqueezed = is_op(table, aten.unsqueeze.default) and table.args[1] in (1, 2, -3, -2)
    return table.args[0] if unsqueezed else table


def rotation_of(x: Node) -> Rotation | None:
    """The rotation of `x`, if `x` is read by it and by nothing else."""
    queue, seen = [x], {x}
    found = None
    for node in queue:
        for user in node.users:
            if user in seen or not (is_op(user, *_INSIDE) or node_is_getitem(user)):
                continue
            seen.add(user)
            queue.append(user)
            candidate = as_rotation(user)
            if candidate is not None and candidate.x is x and value(user).dtype == value(x).dtype:
                found = candidate if _reads_only(x, user) else found
        if len(queue) > 40:
            break
    return found


def _reads_only(x: Node, out: Node) -> bool:
    """True if everything that reads `x` ends in `out` (so that `x` itself may disappear)."""
    seen, stack = set(), list(x.users)
    while stack:
        node = stack.pop()
        if node is out or node in seen:
            continue
        seen.add(node)
        if not node.users or not (is_op(node, *_INSIDE) or node_is_getitem(node)):
            return False
        stack += list(node.users)
    return True


def as_rotation(out: Any) -> Rotation | None:
    """The rotation that ends in `out`, if it is one."""
    if not isinstance(out, Node) or len(shape(out)) != 4:
        return None
    node = strip(out, *CASTS)
    if is_op(node, aten.cat.default) and len(node.args[0]) == 2:
        return _partial(out, *node.args[0])
    if not is_op(node, aten.add.Tensor):
        return None
    found = operands(node, _swapped_times_sin)
    if found is None or not is_op(found[1], aten.mul.Tensor):
        return None
    (x, sin, interleaved), plain = found
    sides = [strip(arg, *CASTS) if isinstance(arg, Node) else None for arg in plain.args]
    cos = plain.args[1] if sides[0] is x else plain.args[0] if sides[1] is x else None
    heads = _heads(cos, x)
    return Rotation(out, x, cos, sin, interleaved, heads) if heads and heads == _heads(sin, x) else None


def _partial(out: Node, turned: Node, rest: Node) -> Rotation | None:
    """`cat(rotated(x[..., :width]), x[..., width:])`; the rest may be empty (Phi-3)."""
    inner = as_rotation(turned)
    if inner is None:
        return None
    if static(shape(rest)[-1]) == 0:
        part = row_range(inner.x)
        whole = part[0] if part is not None and same_size(shape(part[0])[-1], shape(inner.x)[-1]) else inner.x
        return Rotation(out, whole, inner.cos, inner.sin, inner.interleaved, inner.heads)
    low, high = row_range(inner.x), row_range(rest)
    if low is None or high is None or low[0] is not high[0]:
        return None
    covers = low[1] == 0 and low[2] == high[1] and high[2] == static(shape(low[0])[-1])
    return Rotation(out, low[0], inner.cos, inner.sin, inner.interleaved, inner.heads) if covers else None


def _swapped_times_sin(node: Any) -> tuple[Node, Node, bool] | None:
    """(x, sin, interleaved) if `node` is `swap(x) * sin`."""
    if not is_op(node, aten.mul.Tensor):
        return None
    found = operands(node, lambda one: _swap(strip(one, *CASTS)) if isinstance(one, Node) else None)
    return (*found[0][:1], found[1], found[0][1]) if found is not None and isinstance(found[1], Node) else None


def _swap(node: Node) -> tuple[Node, bool] | None:
    """(x, False) for `cat(-x[..., D/2:], x[..., :D/2])`, (x, True) for `stack(-x[..., 1::2], x[..., ::2])`, flat."""
    if is_op(node, aten.cat.default) and len(node.args[0]) == 2 and is_op(node.args[0][0], aten.neg.default):
        high, low = row_range(node.args[0][0].args[0]), row_range(node.args[0][1])
        if high is None or low is None or high[0] is not low[0]:
            return None
        width = static(shape(high[0])[-1])
        whole = width is not None and (low[1], low[2], high[1], high[2]) == (0, width // 2, width // 2, width)
        return (strip(high[0], *CASTS), False) if whole else None
    pair = strip(node, *_JOINS)
    if is_op(pair, aten.stack.default) and is_op(pair.args[0][0], aten.neg.default) and pair.args[1] in (-1, 4):
        odd, even = _every_second(pair.args[0][0].args[0]), _every_second(pair.args[0][1])
        if odd is not None and even is not None and odd[0] is even[0] and (odd[1], even[1]) == (1, 0):
            return strip(odd[0], *CASTS), True
    return None


def _every_second(node: Any) -> tuple[Node, int] | None:
    """(x, first) if `node` is `x[..., first::2]`."""
    if not is_op(node, aten.slice.Tensor) or len(node.args) != 5 or node.args[4] != 2:
        return None
    x, dim, first, last, _ = node.args
    width = static(shape(x)[-1])
    ends = width is not None and isinstance(last, int) and last >= width and width % 2 == 0
    return (x, first or 0) if dim in (-1, len(shape(x)) - 1) and first in (None, 0, 1) and ends else None


def _heads(table: Any, x: Node) -> tuple[int, ...]:
    """Dimensions of x over which the table of angles broadcasts, where the other one is that of the tokens."""
    if not isinstance(table, Node) or len(shape(table)) != 4 or not same_size(shape(table)[-1], shape(x)[-1]):
        return ()
    pairs = ((1, 2), (2, 1))
    return tuple(h for h, t in pairs if static(shape(table)[h]) == 1 and same_size(shape(table)[t], shape(x)[t]))
