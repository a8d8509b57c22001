"""A graph's weights are looked up once per `generate()` call, not once per token.

Dynamo's bytecode looks up every weight of the model for every call (26 layers: 600 of 650 inputs, through four
dictionaries each), and torch hands every one to C++: some 0.9 ms per token, because the weights themselves have just
pushed all of this out of the caches. For our graphs the bytecode asks first whether this thread holds the graph with
its weights bound, and looks them up only if not:

    key = (name of the graph, modules that own the weights)
    graph.split(key, plan, *other inputs, thread.held.get(key) or (weight, weight, ...))

It is held where `guards_once.py` takes the model for unchanged, and as long. Inputs that are the size of another input
(one for each tensor of the KV cache) are not looked up either: the program reads them off that input.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._dynamo.bytecode_transformation import Instruction, create_call_function, create_dup_top, create_instruction
from torch._dynamo.codegen import PyCodegen
from torch._dynamo.source import LocalSource, TensorProperty, TensorPropertySource
from torch._guards import ChainedSource, Source
from torch.utils._ordered_set import OrderedSet

from unicorn_backend.integration import model_state, prepare

TORCH = ("2.13",)  # versions whose bytecode this was written against

Run = Callable[..., Any]
Plan = tuple[tuple[int, ...], tuple[tuple[int, int, int], ...]]
"""Places of the weights among a graph's inputs; places of sizes, each with its tensor's place and the dimension."""


def split(run: Run, bind: Callable[[Sequence[int], Sequence[Any], Sequence[tuple[int, int, int]]], Run]) -> Run:
    """`run` with an attribute `split`, which is what the bytecode calls.

    bind(places, inputs, sizes): `run` with these inputs at these places, and these sizes (see `Plan`); it takes the
    others.
    """

    def call(key: Any, plan: Plan, *inputs: Any) -> Any:
        *others, weights = inputs
        if type(weights) is tuple:
            weights = bind(plan[0], weights, plan[1])
            model_state.hold(key, weights)
        best = model_state.thread.best
        if best is None or best[0] is not key[1]:
            return weights(*others)
        model_state.thread.best = None  # this call, and no other
        return weights(*others, best=best[1])

    @functools.wraps(run)
    def whole(*inputs: Any) -> Any:
        return run(*inputs)

    whole.split = torch._dynamo.disable(call, reason="a compiled graph")  # type: ignore[attr-defined]
    return whole


def install() -> None:
    """Make Dynamo write such bytecode for our graphs, once."""
    plain = PyCodegen.make_call_generated_code
    if not torch.__version__.startswith(TORCH) or hasattr(plain, "_unicorn"):
        return

    @functools.wraps(plain)
    def make_call_generated_code(self: PyCodegen, fn_name: str) -> None:
        output = self.tx.output
        ours = prepare.is_ours() and hasattr(output.global_scope[fn_name], "split")
        if ours and (weights := _places_of_weights(self)) and not any(a.pass_arg_as_tensor for a in output.graphargs):
            _write_call(self, fn_name, weights)
        else:
            plain(self, fn_name)

    make_call_generated_code._unicorn = True  # type: ignore[attr-defined]
    PyCodegen.make_call_generated_code = make_call_generated_code  # type: ignore[method-assign]


def _places_of_weights(codegen: PyCodegen) -> list[int]:
    """Inputs of the graph that are tensors of a module among the frame's locals."""
    scope = codegen.tx.output.local_scope
    found = []
    for place, arg in enumerate(codegen.tx.output.graphargs):
        root = _root(arg.source)
        owner = scope.get(root.local_name) if isinstance(root, LocalSource) else None
        if isinstance(owner, torch.nn.Module) and isinstance(arg.example, torch.Tensor):
            found.append(place)
    return found


def _sizes(codegen: PyCodegen) -> list[tuple[int, int, int]]:
    """Inputs of the graph that are the size of another one (see `Plan`)."""
    args = codegen.tx.output.graphargs
    tensors = {arg.source: place for place, arg in enumerate(args) if isinstance(arg.example, torch.Tensor)}
    found = []
    for place, arg in enumerate(args):
        source = arg.source
        if isinstance(source, TensorPropertySource) and source.prop is TensorProperty.SIZE and source.base in tensors:
            found.append((place, tensors[source.base], int(source.idx or 0)))
    return found


def _root(source: Source | None) -> Source | None:
    while isinstance(source, ChainedSource):
        source = source.base
    return source


def _write_call(codegen: PyCodegen, fn_name: str, weights: list[int]) -> None:
    """The bytecode of the module's docstring."""
    args = codegen.tx.output.graphargs
    sizes = _sizes(codegen)
    known = {*weights, *(place for place, _, _ in sizes)}
    others = [arg for place, arg in enumerate(args) if place not in known]
    roots = OrderedSet([_root(args[place].source) for place in weights])
    looked_up = [*others, *(args[place] for place in weights)]
    _name_shared([arg.source for arg in looked_up if arg.source is not None], codegen)
    codegen.append_output(codegen.create_load_const(fn_name))
    for root in roots:
        codegen(root)
    key = codegen.tx.output.new_var("key")
    codegen.extend_output([create_instruction("BUILD_TUPLE", arg=1 + len(roots)), codegen.create_store(key)])

    def load_split() -> None:
        codegen.extend_output([codegen.create_load_global(fn_name, add=True), codegen.create_load_attr("split")])

    def load_held() -> None:
        codegen.load_import_from(model_state.__name__, "thread")
        codegen.extend_output([codegen.create_load_attr("held"), codegen.create_load_attr("get")])

    codegen.add_push_null(load_split)
    codegen.extend_output([codegen.create_load(key), codegen.create_load_const((tuple(weights), tuple(sizes)))])
    for arg in others:
        codegen.call_reconstruct(arg)
    codegen.add_push_null(load_held)
    codegen.extend_output([codegen.create_load(key), *create_call_function(1, False)])
    end = create_instruction("NOP")
    codegen.extend_output([*_keep_if_true(end), create_instruction("POP_TOP")])
    named = {source for source, name in codegen.tempvars.items() if name is not None}
    for place in weights:
        codegen.call_reconstruct(args[place])
    for source, name in list(codegen.tempvars.items()):
        if name is not None and source not in named:  # has no value where the jump is taken
            codegen.append_output(codegen.create_delete(name))
            del codegen.tempvars[source]
    codegen.extend_output([create_instruction("BUILD_TUPLE", arg=len(weights)), end])
    codegen.extend_output(create_call_function(2 + len(others) + 1, False))
    codegen.clear_tempvars()


def _keep_if_true(target: Instruction) -> list[Instruction]:
    """Jump to `target` if the top of the stack is true; it stays there."""
    name = "POP_JUMP_FORWARD_IF_TRUE" if sys.version_info[:2] == (3, 11) else "POP_JUMP_IF_TRUE"
    to_bool = [create_instruction("TO_BOOL")] if sys.version_info >= (3, 13) else []
    return [create_dup_top(), *to_bool, create_instruction(name, target=target)]


def _name_shared(sources: list[Source], codegen: PyCodegen) -> None:
    """Have what several inputs are found through looked up once, as Dynamo does."""
    seen: OrderedSet[Source] = OrderedSet()
    queue = list(sources)
    while queue:
        source = queue.pop(0)
        if source in seen:
            codegen.mark_source_temp(source)
            continue
        seen.add(source)
        index = getattr(source, "index", None)
        queue += [source.base] if isinstance(source, ChainedSource) else []
        queue += [index] if isinstance(index, Source) else []
