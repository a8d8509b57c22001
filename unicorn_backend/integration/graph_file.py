"""A finished fx graph as plain data, and back.

Nodes, their targets by name, and the few small constants that a trace leaves on the module. `GraphModule`'s own
pickling traces the generated code again; this does not. `meta` is not kept.
"""

from __future__ import annotations

import importlib
import operator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

MAX_CONSTANT_BYTES = 1 << 16  # a larger one would be a weight, and those are inputs

_LEAVES = (type(None), bool, int, float, complex, str, type(Ellipsis))
_TORCH_LEAVES = (torch.dtype, torch.device, torch.layout, torch.memory_format)


class NotPortable(Exception):
    """Something has no meaning in another process; the text says what."""


def dump(gm: GraphModule) -> dict[str, Any]:
    """Plain data for `load`. Raises NotPortable."""
    numbers = {node: i for i, node in enumerate(gm.graph.nodes)}
    nodes: list[Any] = []
    constants: dict[str, torch.Tensor] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            constants[str(node.target)] = _constant(gm, str(node.target))
        elif node.op not in ("placeholder", "call_function", "output"):
            raise NotPortable(f"the graph has a {node.op} node")
        target = dump_target(node.target) if node.op == "call_function" else node.target
        args, kwargs = _dump_value(node.args, numbers), _dump_value(node.kwargs, numbers)
        nodes.append((node.op, node.name, target, args, kwargs))
    return {"nodes": nodes, "constants": constants}


def load(data: dict[str, Any]) -> GraphModule:
    """The graph module that `dump` was given, without `meta`."""
    graph = Graph()
    nodes: list[Node] = []
    for op, name, target, args, kwargs in data["nodes"]:
        target = load_target(target) if op == "call_function" else target
        nodes.append(graph.create_node(op, target, _load_value(args, nodes), _load_value(kwargs, nodes), name))
    return GraphModule(data["constants"], graph)


def dump_target(target: Any) -> tuple[str, ...]:
    """A function by a name that gives it again. Raises NotPortable."""
    if isinstance(target, torch._ops.OpOverload):
        return ("op", target.namespace, target._opname, target._overloadname)
    module = getattr(target, "__module__", None) or "builtins"
    name = getattr(target, "__qualname__", None) or ""
    if module == "_operator":
        module = operator.__name__
    found = ("name", str(module), str(name))
    try:
        same = load_target(found) is target
    except (ImportError, AttributeError) as error:
        raise NotPortable(f"{target} cannot be found by its name") from error
    if not same:
        raise NotPortable(f"{target} is not what its name {module}.{name} gives")
    return found


def load_target(target: tuple[str, ...]) -> Any:
    if target[0] == "op":
        return getattr(getattr(getattr(torch.ops, target[1]), target[2]), target[3])
    value: Any = importlib.import_module(target[1])
    for part in target[2].split("."):
        value = getattr(value, part)
    return value


def _constant(gm: GraphModule, name: str) -> torch.Tensor:
    value = getattr(gm, name, None)
    if type(value) is not torch.Tensor or value.nbytes > MAX_CONSTANT_BYTES or value.requires_grad:
        raise NotPortable(f"the constant {name} of the graph is not a small plain tensor")
    return value.detach().clone()


def _dump_value(value: Any, numbers: dict[Node, int]) -> Any:
    if isinstance(value, Node):
        return ("node", numbers[value])
    if type(value) in _LEAVES or isinstance(value, _TORCH_LEAVES):
        return ("leaf", value)
    if isinstance(value, slice):
        return ("slice", [_dump_value(v, numbers) for v in (value.start, value.stop, value.step)])
    if isinstance(value, dict):
        return ("dict", {key: _dump_value(v, numbers) for key, v in value.items()})
    if isinstance(value, (tuple, list)):
        return ("tuple" if isinstance(value, tuple) else "list", [_dump_value(v, numbers) for v in value])
    raise NotPortable(f"the graph has an argument of type {type(value).__name__}")


def _load_value(value: Any, nodes: list[Node]) -> Any:
    kind, data = value
    if kind == "node":
        return nodes[data]
    if kind == "leaf":
        return data
    if kind == "dict":
        return {key: _load_value(v, nodes) for key, v in data.items()}
    items = [_load_value(v, nodes) for v in data]
    return slice(*items) if kind == "slice" else tuple(items) if kind == "tuple" else items
