"""The vocabulary of the patterns: what a node is, and walks through what does not compute.

A pattern starts at an anchor (`scaled_dot_product_attention`, a gated activation) and walks to the
linears around it. No class or parameter name is looked at, only operators and shapes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from unicorn_backend import ops  # noqa: F401  (defines torch.ops.unicorn)

aten = torch.ops.aten
unicorn = torch.ops.unicorn

VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
TRANSPOSES = (aten.transpose.int, aten.permute.default)
CASTS = (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default)
SPLITS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes)
COPIES = (aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default)

T = TypeVar("T")


@dataclass(frozen=True)
class Reason:
    """Why something was left to plain torch (or to a smaller op than it could have had)."""

    what: str  # "attention", "ffn", "projection", ...
    where: str  # name of the anchor node
    text: str

    def __str__(self) -> str:
        return f"{self.what} at {self.where}: {self.text}"


@dataclass(frozen=True)
class Linear:
    """One projection `x W^T + b`, whole or a range of rows of a wider one.

    `weights` is the op contract's weight list; `rows` = (first, last) inside it, or None for all.
    """

    node: Node  # produces [..., n]
    x: Node
    weights: tuple[Node, ...]
    bias: Node | None
    n: int
    rows: tuple[int, int] | None = None


@dataclass
class Norm:
    """RMS norm of `x`; `w` may be None (no weight)."""

    node: Node
    x: Node
    w: Node | None
    eps: float
    offset: float


@dataclass
class Tail:
    """What follows a projection and can be absorbed: post-norm, then residual add."""

    out: Node
    norm: Norm | None = None
    residual: Node | None = None
    skipped: list[Node] = field(default_factory=list)


def is_op(node: Any, *targets: Any) -> bool:
    """True if `node` is a call of one of `targets`."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def strip(node: Node, *targets: Any) -> Node:
    """Walk up through unary nodes that call one of `targets`."""
    while is_op(node, *targets) and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def value(node: Any) -> Any:
    """The fake value of a node (FakeTensor, SymInt, ...), or the constant itself."""
    return node.meta.get("val") if isinstance(node, Node) else node


def shape(node: Node) -> tuple[Any, ...]:
    """Shape of the tensor that `node` gives; () if it gives none."""
    val = value(node)
    return tuple(val.shape) if isinstance(val, torch.Tensor) else ()


def static(size: Any) -> int | None:
    """`size` if it is known at compile time (a SymInt may have been pinned to a number), else None."""
    if isinstance(size, torch.SymInt):
        known: int | None = size.node.maybe_as_int()
        return known
    return size if isinstance(size, int) and not isinstance(size, bool) else None


def same_size(a: Any, b: Any) -> bool:
    """True if two sizes are equal for sure: equal ints, or the same symbolic expression."""
    if static(a) is not None and static(b) is not None:
        return static(a) == static(b)
    expr_a, expr_b = (getattr(getattr(s, "node", None), "expr", s) for s in (a, b))
    return bool(expr_a == expr_b)


def same_shape(a: Node, b: Node) -> bool:
    sa, sb = shape(a), shape(b)
    return len(sa) == len(sb) and all(same_size(x, y) for x, y in zip(sa, sb, strict=True))


def number(node: Any) -> float | None:
    """The number that `node` is, or the only element of a tensor that is computed without any input; else None."""
    if not isinstance(node, Node):
        return float(node) if isinstance(node, (int, float)) else None
    values: dict[Node, Any] = {}
    for part in sorted(ancestors := _ancestors(node), key=ordering(node.graph).__getitem__):
        if part.op == "get_attr":
            values[part] = operator.attrgetter(str(part.target))(part.graph.owning_module)
        elif not isinstance(part.target, OpOverload) and part.target is not operator.getitem:
            return None
        elif torch.Tag.nondeterministic_seeded in getattr(part.target, "tags", ()):
            return None
        else:
            args, kwargs = (map_arg(given, values.__getitem__) for given in (part.args, part.kwargs))
            values[part] = part.target(*args, **kwargs)
        if any(_writes(user) and user not in ancestors for user in part.users):
            return None
    result = values.get(node)
    return float(result) if isinstance(result, torch.Tensor) and result.numel() == 1 else None


def _ancestors(node: Node) -> set[Node]:
    """`node` and all that it is computed from; nothing if that is much, or an input."""
    found: set[Node] = set()
    queue = [node]
    while queue:
        part = queue.pop()
        if part.op not in ("call_function", "get_attr") or len(found) > 64:
            return set()
        queue += [other for other in part.all_input_nodes if other not in found]
        found.add(part)
    return found


def _writes(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and bool(node.target._schema.is_mutable)


def operands(node: Node, match: Callable[[Any], T | None]) -> tuple[T, Any] | None:
    """For a commutative binary node: (what `match` gave for one operand, the other operand)."""
    first, second = node.args[0], node.args[1]
    for one, other in ((first, second), (second, first)):
        found = match(one)
        if found is not None:
            return found, other
    return None


def only_user(node: Node) -> Node | None:
    """The single user of `node`, or None if it has none or several."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def follow(node: Node, *targets: Any) -> Node:
    """Walk down through single-user nodes that call one of `targets`."""
    while (user := only_user(node)) is not None and is_op(user, *targets) and user.args[0] is node:
        node = user
    return node


def as_linear(node: Any) -> Linear | None:
    """`node` as a projection: `aten.linear`, `unicorn.linear`, or a row range of either."""
    if is_op(node, aten.linear.default):
        x, w, bias = node.args[0], node.args[1], node.args[2] if len(node.args) > 2 else None
        n = static(shape(w)[0])
        return None if n is None else Linear(node, x, (w,), bias, n)
    if is_op(node, unicorn.linear.default):
        x, w, bias, n = node.args
        return Linear(node, x, tuple(w), bias, n)
    return _as_row_range(node)


def _as_row_range(node: Any) -> Linear | None:
    """A slice, chunk or split of a projection's last dimension (fused QKV, fused gate+up)."""
    source = row_range(node)
    if source is None:
        return None
    base, first, last = source
    whole = as_linear(base)
    if whole is None:
        return None
    if whole.rows is not None:
        first, last = first + whole.rows[0], last + whole.rows[0]
    return Linear(node, whole.x, whole.weights, whole.bias, last - first, (first, last))


def row_range(node: Any) -> tuple[Node, int, int] | None:
    """(base, first, last) if `node` is base[..., first:last] on the last dimension."""
    if is_op(node, aten.slice.Tensor):
        base = node.args[0]
        rank, size = len(shape(base)), static(shape(base)[-1])
        dim = node.args[1] if len(node.args) > 1 else 0
        step = node.args[4] if len(node.args) > 4 else 1
        if dim not in (rank - 1, -1) or size is None or step != 1:
            return None
        first = _clamp(node.args[2] if len(node.args) > 2 else 0, size)
        last = _clamp(node.args[3] if len(node.args) > 3 else size, size)
        return None if first is None or last is None else (base, first, last)
    if node_is_getitem(node):
        parts = node.args[0]
        if is_op(parts, *SPLITS):
            base = parts.args[0]
            dim = parts.args[2] if len(parts.args) > 2 else parts.kwargs.get("dim", 0)
            sizes = [static(part.shape[-1]) for part in value(parts)]
            if dim not in (len(shape(base)) - 1, -1) or None in sizes:
                return None
            known = [size for size in sizes if size is not None]
            first = sum(known[: node.args[1]])
            return base, first, first + known[node.args[1]]
    return None


def node_is_getitem(node: Any) -> bool:
    return is_op(node, operator.getitem) and isinstance(node.args[0], Node) and isinstance(node.args[1], int)


def _clamp(index: Any, size: int) -> int | None:
    if index is None:
        return 0
    if not isinstance(index, int):
        return None
    return max(0, min(size, index + size if index < 0 else index))


def as_norm(node: Any) -> Norm | None:
    """`node` as an RMS norm (the norm pass has already turned every form of it into our op)."""
    if not is_op(node, unicorn.rms_norm.default):
        return None
    x, w, eps, offset = node.args
    return Norm(node, x, w, eps, offset)


def tail_of(linear: Node) -> Tail:
    """What follows projection `linear` and nothing else reads: [post-norm] [residual add]."""
    tail = Tail(out=linear)
    user = only_user(linear)
    if user is not None and (norm := as_norm(user)) is not None and norm.x is linear:
        tail.norm, tail.out = norm, user
        user = only_user(user)
    if user is None or not is_op(user, aten.add.Tensor) or user.kwargs.get("alpha", 1) != 1:
        return tail
    other = user.args[1] if user.args[0] is tail.out else user.args[0]
    if not isinstance(other, Node) or other is tail.out:
        return tail
    if same_shape(other, tail.out) and _same_dtype(other, tail.out):
        tail.residual, tail.out = other, user
    return tail


def _same_dtype(a: Node, b: Node) -> bool:
    return bool(value(a).dtype == value(b).dtype)


def last_of(nodes: Iterable[Node], order: dict[Node, int]) -> Node:
    return max(nodes, key=lambda node: order[node])


def ordering(graph: Graph) -> dict[Node, int]:
    return {node: index for index, node in enumerate(graph.nodes)}
