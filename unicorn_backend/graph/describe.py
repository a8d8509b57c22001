"""A rewritten graph -> a `Plan`: read off the graph itself, so that it cannot claim what does not run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from unicorn_backend.graph.pattern import Reason, as_linear, aten, is_op, static, unicorn, value
from unicorn_backend.layouts import GROUP, ROW_SCALE, ROWS, scheme_of
from unicorn_backend.plan import Left, Plan, Step

# op -> (kind, positions of its weight lists)
OPS: dict[Any, tuple[str, tuple[int, ...]]] = {
    unicorn.int4_ffn.default: ("ffn", (4, 5, 6)),
    unicorn.sparse_ffn.default: ("ffn", (4, 5, 6)),
    unicorn.int8_attention.default: ("attention", (7,)),
    unicorn.int8_qkv.default: ("qkv", (4, 5, 6)),
    unicorn.linear.default: ("linear", (1,)),
    unicorn.experts_linear.default: ("experts", (2,)),
    unicorn.embedding.default: ("embedding", (1,)),
    unicorn.rms_norm.default: ("norm", ()),
}

_BY_HEAD = (unicorn.int8_attention.default,)  # first argument [B, H, T, D]


def describe(gm: GraphModule, names: dict[Node, str], reasons: Iterable[Reason], number: int) -> Plan:
    """Plan of graph `number`. `names`: placeholder -> path of the parameter it stands for."""
    plan = Plan(number, _tokens(gm))
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in OPS:
            plan.steps.append(_step(node, names))
        elif isinstance(node.target, torch._ops.OpOverload):
            name = str(node.target)
            plan.torch_ops[name] = plan.torch_ops.get(name, 0) + 1
            if is_op(node, aten.linear.default):
                plan.left.append(Left("linear", _where(_weights_of(node), names, node), "float weight: not quantized"))
    plan.left += [Left(reason.what, reason.where, reason.text) for reason in reasons]
    return plan


def _step(node: Node, names: dict[Node, str]) -> Step:
    kind, positions = OPS[node.target]
    lists = [list(node.args[position]) for position in positions]
    if kind == "norm" and isinstance(node.args[1], Node):
        lists = [[node.args[1]]]
    schemes = tuple(scheme(weights) for weights in lists) if positions else ()
    # an embedding reads one row per token, not its table
    read = 0 if kind in ("embedding", "norm") else sum(_bytes(w) for weights in lists for w in weights)
    if kind == "experts":
        read = read * _hit(node) // _experts(node)
    flat = [w for weights in lists for w in weights]
    op = str(node.target).removesuffix(".default").replace(".", "::")
    weights = tuple(0 if kind == "embedding" else math.prod(_size(packed)) for packed in lists) if schemes else ()
    keys: dict[str, Any] = _key_costs(node) if kind == "attention" else {}
    return Step(
        kind,
        _where(flat, names, node),
        op,
        "cpu",
        schemes,
        read,
        weights=weights,
        width=_width(node, kind, lists),
        tokens=_fixed_tokens(node),
        **keys,
    )


def _experts(node: Node) -> int:
    """How many experts there are."""
    return int(_size(list(node.args[2]))[0]) // int(node.args[4])


def _hit(node: Node) -> int:
    """How many of them one call reads: all that its tokens may choose."""
    tokens, each = value(node.args[1]).shape
    return min(_experts(node), (_constant(tokens) or _experts(node)) * int(static(each) or _experts(node)))


def _fixed_tokens(node: Node) -> int:
    """Tokens of the node's first argument, 0 if they are known at run time only."""
    rows = value(node.args[0]).shape
    if node.target in _BY_HEAD:
        rows = (rows[0], rows[2], rows[3])
    dims = [_constant(size) for size in (rows if node.target is unicorn.embedding.default else rows[:-1])]
    return math.prod(dims)


def _constant(size: Any) -> int:
    """A size that is fixed, or was 1 in the traced prompt (tokens whose logits are asked for); 0 where it varies."""
    known = static(size)
    return known if known is not None else int(size.node.hint == 1)


def _width(node: Node, kind: str, lists: list[list[Node]]) -> int:
    """Values per token that go in and come out: the inner ones of a feed-forward once."""
    if kind in ("embedding", "norm"):
        return int(static(value(node).shape[-1]) or 0)
    sizes = [_size(weights) for weights in lists]
    return sizes[0][1] + sum(n for n, _ in sizes) - (sizes[0][0] if kind == "ffn" else 0)


def _size(weights: list[Node]) -> tuple[int, int]:
    """(rows, columns) of a weight, the padding of tiles included."""
    shape = value(weights[0]).shape
    return (int(shape[0]), int(shape[1])) if len(weights) == 1 else (int(shape[0]) * ROWS, int(shape[1]) * GROUP)


def _key_costs(node: Node) -> dict[str, int]:
    q, k, v = (value(node.args[i]) for i in range(3))
    heads, kv_heads = (int(static(tensor.shape[1]) or 0) for tensor in (q, k))
    stored = int(static(k.shape[3]) or 0) + int(static(v.shape[3]) or 0)
    values = stored - 2 * ROW_SCALE * (k.dtype == torch.int8)
    per_key = kv_heads * stored * k.element_size()
    return {"key_macs": heads * values, "key_heads": heads, "key_bytes": per_key, "kv_heads": kv_heads}


def scheme(weights: list[Node]) -> str:
    """Scheme name of a weight list, from dtypes and shapes alone (see `ops.py`)."""
    if len(weights) == 1:
        return str(value(weights[0]).dtype).removeprefix("torch.")
    return scheme_of([value(weight) for weight in weights])


def _bytes(node: Node) -> int:
    tensor = value(node)
    return int(tensor.numel() * tensor.element_size())


def _weights_of(node: Node) -> list[Node]:
    linear = as_linear(node)
    return list(linear.weights) if linear is not None else []


def _where(weights: list[Node], names: dict[Node, str], node: Node) -> str:
    """Longest common module path of the parameters behind `weights`."""
    sources = [names.get(_source(w), "") for w in weights]
    paths = [path.rpartition(".")[0] for path in sources if path]
    if not paths:
        return str(node.name)
    split = [path.split(".") for path in paths]
    common = [keys[0] for keys in zip(*split, strict=False) if len(set(keys)) == 1]
    return ".".join(common) or paths[0]


def _source(node: Node) -> Node:
    while is_op(node, aten.slice.Tensor):
        node = node.args[0]
    return node


def _tokens(gm: GraphModule) -> str:
    """Tokens per call, read off the first integer input (token ids) of two dimensions."""
    for node in gm.graph.nodes:
        tensor = value(node) if node.op == "placeholder" else None
        if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.int64 and tensor.dim() == 2:
            known = static(tensor.shape[1])
            return "dynamic" if known is None else str(known)
    return "unknown"


def parameter_names(gm: GraphModule) -> list[str]:
    """For each placeholder of Dynamo's graph: the path of the module attribute it stands for."""
    return [_path(node) for node in gm.graph.nodes if node.op == "placeholder"]


def _path(node: Node) -> str:
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    name = name() if callable(name) else name
    keys = re.findall(r"_(?:modules|parameters|buffers)\['([^']+)'\]", name)
    tail = re.search(r"\.(\w+)$", name)
    if tail and not tail.group(1).startswith(("_modules", "_parameters", "_buffers")):
        keys.append(tail.group(1))
    return ".".join(keys)
