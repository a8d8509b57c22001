"""A rewritten graph -> a native `Program` (`ops/program.cpp`): the same calls in the same order, without Python.

A decode step of a 26-layer model is some 150 calls. Each costs 10 to 30 us from generated Python and about
1 us from the program, which also runs without the interpreter lock.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from unicorn_backend.graph.capture import constant
from unicorn_backend.integration import screening

_MEMORY_FORMATS = {  # the only kind of constant that torch does not convert for a native class
    torch.contiguous_format: 0,
    torch.preserve_format: 1,
    torch.channels_last: 2,
    torch.channels_last_3d: 3,
}
_CONSTANTS = (Tensor, bool, int, float, str, torch.dtype, torch.layout, torch.device)
_ERRORS: dict[str, type[Exception]] = {"IndexError": IndexError, "ValueError": ValueError}  # see Bound::run
_SYMBOLIC = {torch.sym_min: "sym_min", torch.sym_max: "sym_max"}


class _CannotLower(Exception):
    """Something in the graph that a Program has no step for."""


def lower(gm: GraphModule) -> Lowered | str:
    """A callable with the inputs and outputs of `gm`, or why there is none.

    There is none for graphs with something else than ATen and custom operators and integer arithmetic
    (higher-order operators, for example); such a graph runs as the Python that FX generates.
    """
    try:
        return Lowered(_Lowering(gm).program)
    except _CannotLower as reason:
        return str(reason)


class Lowered:
    """A native program as a function."""

    def __init__(self, program: Any) -> None:
        self._program = program
        self._run = self.bind((), ())

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        return self._run(*inputs)

    def bind(
        self, places: Sequence[int], inputs: Sequence[Any], sizes: Sequence[tuple[int, int, int]] = ()
    ) -> Callable[..., tuple[Any, ...]]:
        """The function with `inputs` at `places` fixed: it takes the others, in their order.

        What ops need of fixed inputs is checked and read once, the first time. The function has an argument `best`:
        with a number, the model's head need not give more than its so many largest scores (`screening.py`).
        sizes: (place, place of a tensor, dimension) of inputs that are the size of another one, and not given either.
        """
        bound = self._program.bind(list(places), list(inputs), [number for triple in sizes for number in triple])

        screened = False

        def run(*others: Any, best: int = 0) -> tuple[Any, ...]:
            nonlocal screened
            if best and not screened:
                screening.screen(bound)
                screened = True
            try:
                return tuple(bound.run(others, best))
            except RuntimeError as error:
                kind, _, text = str(error).partition(": ")
                raise _ERRORS.get(kind, RuntimeError)(text if kind in _ERRORS else str(error)) from None

        return run


class _Lowering:
    def __init__(self, gm: GraphModule) -> None:
        self._gm = gm
        placeholders = gm.graph.find_nodes(op="placeholder")
        self.program = torch.classes.unicorn.Program(len(placeholders))
        self._functions = set(torch.classes.unicorn.Program.functions())
        self._value: dict[Node, int] = {node: index for index, node in enumerate(placeholders)}
        self._results: dict[Node, int] = {}  # nodes with several results: the first one's number
        last_use = _last_uses(gm)
        for node in gm.graph.nodes:
            if self._step(node):
                self.program.drop([n for dead in last_use.get(node, ()) if (n := self._value.get(dead, -1)) >= 0])

    def _step(self, node: Node) -> bool:
        """Add what `node` stands for; True if it became a step."""
        if node.op == "output":
            self.program.outputs([self._number(arg) for arg in node.args[0]])
        elif node.op == "get_attr":
            self._value[node] = self.program.constant(constant(self._gm, node))
        elif node.op == "call_function" and node.target is operator.getitem and node.args[0] in self._results:
            self._value[node] = self._results[node.args[0]] + int(node.args[1])
        elif node.op == "call_function":
            self._call(node)
            return True
        elif node.op != "placeholder":
            raise _CannotLower(f"{node.op} {node.target}")
        return False

    def _call(self, node: Node) -> None:
        name = _SYMBOLIC.get(node.target) or getattr(node.target, "__name__", "").strip("_")
        if isinstance(node.target, torch._ops.OpOverload):
            first = self._operator(node, node.target)
            returns = len(node.target._schema.returns)
            if returns > 0:
                (self._results if returns > 1 else self._value)[node] = first
        elif node.target is operator.neg:
            self._value[node] = self.program.compute("sub", self._number(0), self._integer(node.args[0]))
        elif name in self._functions and (node.target in _SYMBOLIC or node.target is getattr(operator, name, None)):
            self._value[node] = self.program.compute(name, *(self._integer(arg) for arg in node.args))
        else:
            raise _CannotLower(f"{node.target} is not an operator")

    def _operator(self, node: Node, op: torch._ops.OpOverload) -> int:
        counts, numbers = [], []
        for arg in _arguments(node, op):
            several = isinstance(arg, (list, tuple))
            counts.append(len(arg) if several else -1)
            numbers += [self._number(item) for item in (arg if several else (arg,))]
        overload = "" if op._overloadname == "default" else op._overloadname
        return int(self.program.call(op._schema.name, overload, counts, numbers))

    def _integer(self, arg: Any) -> int:
        if not isinstance(arg, (int, Node)) or (
            isinstance(arg, Node) and isinstance(arg.meta.get("val"), torch.SymFloat)
        ):
            raise _CannotLower(f"arithmetic on {arg!r}")
        return self._number(arg)

    def _number(self, arg: Any) -> int:
        """The number of a value or of a new constant."""
        if isinstance(arg, Node):
            if arg not in self._value:
                raise _CannotLower(f"{arg.target} with several results used as a whole")
            return self._value[arg]
        if isinstance(arg, torch.memory_format):
            arg = _MEMORY_FORMATS[arg]
        if arg is not None and not isinstance(arg, _CONSTANTS):
            raise _CannotLower(f"an argument {arg!r} of type {type(arg).__name__}")
        return int(self.program.constant(arg))


def _arguments(node: Node, op: torch._ops.OpOverload) -> Sequence[Any]:
    """The values of all parameters of the schema, in order."""
    values: list[Any] = list(node.args)
    for parameter in op._schema.arguments[len(values) :]:
        values.append(node.kwargs.get(parameter.name, parameter.default_value))
    return values


def _last_uses(gm: GraphModule) -> dict[Node, list[Node]]:
    """Node -> values that nothing after it reads. Inputs too: the program need not keep what the caller dropped."""
    last: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        last[node] = node
        for used in node.all_input_nodes:
            last[used] = node
    dead: dict[Node, list[Node]] = {}
    for value, user in last.items():
        dead.setdefault(user, []).append(value)
    return dead
