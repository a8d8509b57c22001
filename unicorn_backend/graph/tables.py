"""What every layer of a call shares and nothing but positions decides: masks and rotary tables, one op each.

Of the 45 small torch operators that a decode step has beside its regions, 40 compute these. Each takes 3 to 10 us, as
what it needs has just been pushed out of the caches by the weights.

- A mask of transformers is a conjunction of comparisons between query and key positions: `key > query - window`,
  `key <= query`. Such a band is `unicorn::band_mask`.
- `cos(cat(f, f)) * scale` with `f = position * inv_freq`, and the same with sin, are `unicorn::rotary_tables`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from unicorn_backend.graph.pattern import CASTS, aten, is_op, only_user, shape, static, unicorn, value

_FAR = 2**40  # a bound that no mask reaches

_ANDS = (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default)
_ONES = (aten.new_ones.default, aten.ones.default)
_COMPARISONS = {  # is a (compared) b: (sign, least difference) for sign * (a - b) >= least
    aten.gt.Tensor: (1, 1),
    aten.ge.Tensor: (1, 0),
    aten.lt.Tensor: (-1, 1),
    aten.le.Tensor: (-1, 0),
}
_QUERIES, _KEYS = 2, 3  # dimensions of a mask [1, 1, T, S]


def fuse_tables(gm: GraphModule) -> int:
    """Replace masks and rotary tables, in place. Returns how many."""
    count = sum(_fuse_mask(gm, node) for node in reversed(list(gm.graph.nodes)))
    count += sum(_fuse_rotary(gm, node) for node in list(gm.graph.nodes))
    gm.graph.eliminate_dead_code()
    return count


# ---- masks ------------------------------------------------------------------------------------------------------


@dataclass
class _Positions:
    """`arange(count) + offset` along one dimension of a mask; `offset` is the sum of `plus` less that of `minus`."""

    dim: int
    count: Any
    plus: list[Any]
    minus: list[Any]


def _fuse_mask(gm: GraphModule, node: Node) -> bool:
    if not is_op(node, *_ANDS, *_COMPARISONS) or len(shape(node)) != 4 or not node.users:
        return False
    terms = _terms(node)
    if terms is None or any(static(size) != 1 for size in shape(node)[:2]):
        return False
    axes = {p.dim: p for term in terms for p in term[:2]}
    if axes.keys() != {_QUERIES, _KEYS}:
        return False
    with gm.graph.inserting_before(node):
        lower, upper = _bounds(gm, terms)
        args = (axes[_QUERIES].count, axes[_KEYS].count, lower, upper)
        fused = gm.graph.call_function(unicorn.band_mask.default, args)
    fused.meta["val"] = value(node)
    node.replace_all_uses_with(fused)
    return True


def _terms(node: Any) -> list[tuple[_Positions, _Positions, int, int]] | None:
    """The comparisons that `node` is a conjunction of, or None if it is something else: (a, b, sign, least)."""
    if is_op(node, *CASTS) and value(node).dtype == value(node.args[0]).dtype == torch.bool:
        return _terms(node.args[0])
    if is_op(node, *_ONES) and value(node).dtype == torch.bool and not shape(node):
        return []
    if is_op(node, *_ANDS):
        first, second = _terms(node.args[0]), _terms(node.args[1])
        return None if first is None or second is None else first + second
    if is_op(node, *_COMPARISONS):
        a, b = _positions(node.args[0]), _positions(node.args[1])
        if a is not None and b is not None and {a.dim, b.dim} == {_QUERIES, _KEYS}:
            return [(a, b, *_COMPARISONS[node.target])]
    return None


def _positions(node: Any) -> _Positions | None:
    """`node` as positions along the queries [1, 1, T, 1] or the keys [1, 1, 1, S]."""
    plus: list[Any] = []
    minus: list[Any] = []
    unsqueezed: list[int] = []
    while is_op(node, aten.add.Tensor, aten.sub.Tensor, aten.unsqueeze.default):
        if node.target is aten.unsqueeze.default:
            unsqueezed.append(node.args[1])
        elif _is_integer(node.args[1]) and not node.kwargs:
            (plus if node.target is aten.add.Tensor else minus).append(node.args[1])
        else:
            return None
        node = node.args[0]
    if not is_op(node, aten.arange.default) or value(node).dtype != torch.int64 or len(unsqueezed) != 3:
        return None
    axis = 0
    for rank, dim in enumerate(reversed(unsqueezed), 1):
        axis += (dim if dim >= 0 else dim + rank + 1) <= axis
    return _Positions(axis, node.args[0], plus, minus)


def _is_integer(arg: Any) -> bool:
    return isinstance(value(arg), (int, torch.SymInt)) and not isinstance(value(arg), bool)


def _bounds(gm: GraphModule, terms: list[tuple[_Positions, _Positions, int, int]]) -> tuple[Any, Any]:
    """The least and the largest `j - i` of key j and query i that all terms allow."""
    lower: list[Any] = []
    upper: list[Any] = []
    for a, b, sign, least in terms:
        # sign * (a - b) >= least, a = its index + its offset: sign * (index of a - index of b) >= bound
        plus, minus = (b.plus + a.minus, b.minus + a.plus) if sign > 0 else (a.plus + b.minus, a.minus + b.plus)
        bound = _sum(gm, least, plus, minus)
        if (a.dim == _KEYS) == (sign > 0):
            lower.append(bound)
        else:
            upper.append(_call(gm, operator.sub, 0, bound))
    return _join(gm, torch.sym_max, lower, -_FAR), _join(gm, torch.sym_min, upper, _FAR)


def _sum(gm: GraphModule, start: int, plus: list[Any], minus: list[Any]) -> Any:
    for function, numbers in ((operator.add, plus), (operator.sub, minus)):
        for number in numbers:
            start = _call(gm, function, start, number)
    return start


def _join(gm: GraphModule, function: Any, bounds: list[Any], nothing: int) -> Any:
    joined = bounds[0] if bounds else nothing
    for bound in bounds[1:]:
        joined = _call(gm, function, joined, bound)
    return joined


def _call(gm: GraphModule, function: Any, a: Any, b: Any) -> Any:
    """function(a, b): a number, or a node that gives it."""
    if not isinstance(a, Node) and not isinstance(b, Node):
        return function(a, b)
    node = gm.graph.call_function(function, (a, b))
    node.meta["val"] = function(value(a), value(b))
    return node


# ---- rotary tables ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Table:
    """`f(angles) * scale` in `dtype`: the node that gives it."""

    out: Node
    scale: float
    dtype: torch.dtype


def _fuse_rotary(gm: GraphModule, angles: Node) -> bool:
    """`angles`: cat(f, f) along the last dimension, float32 [B, T, D]."""
    found = _angles(angles)
    if found is None:
        return False
    cos, sin = _table(angles, aten.cos.default), _table(angles, aten.sin.default)
    if cos is None or sin is None or len(angles.users) != 2 or (cos.scale, cos.dtype) != (sin.scale, sin.dtype):
        return False
    with gm.graph.inserting_after(angles):
        fused = gm.graph.call_function(unicorn.rotary_tables.default, (*found, cos.scale, cos.dtype))
    fused.meta["val"] = (value(cos.out), value(sin.out))
    for number, table in reversed(list(enumerate((cos, sin)))):
        with gm.graph.inserting_after(fused):
            part = gm.graph.call_function(operator.getitem, (fused, number))
        part.meta["val"] = value(table.out)
        table.out.replace_all_uses_with(part)
    return True


def _angles(node: Node) -> tuple[Node, Node] | None:
    """(positions [B, T], inv_freq [D / 2]) of the angles."""
    if not is_op(node, aten.cat.default) or len(shape(node)) != 3 or node.args[1:] not in ((-1,), (2,)):
        return None
    halves: Any = node.args[0]
    if len(halves) != 2 or halves[0] is not halves[1] or not is_op(halves[0], aten.mul.Tensor):
        return None
    column, inv_freq = halves[0].args
    if not isinstance(inv_freq, Node) or len(shape(inv_freq)) != 1 or value(inv_freq).dtype != torch.float32:
        return None
    if (
        not is_op(column, *CASTS)
        or value(column).dtype != torch.float32
        or not is_op(column.args[0], aten.unsqueeze.default)
    ):
        return None
    positions, dim = column.args[0].args[:2]
    whole = len(shape(positions)) == 2 and dim in (2, -1) and value(positions).dtype == torch.int64
    return (positions, inv_freq) if whole else None


def _table(angles: Node, function: Any) -> _Table | None:
    """What is computed by `function` from the angles."""
    out = next((user for user in angles.users if is_op(user, function)), None)
    if out is None:
        return None
    scale = 1.0
    user = only_user(out)
    if is_op(user, aten.mul.Tensor) and user is not None and isinstance(user.args[1], float):
        scale, out = user.args[1], user
        user = only_user(out)
    if is_op(user, aten.to.dtype) and user is not None and value(user).dtype in (torch.bfloat16, torch.float16):
        out = user
    return _Table(out, scale, value(out).dtype)
