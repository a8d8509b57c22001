"""Guards on the model are evaluated once per `generate()` call, not once per token.

Of the 12,000 guards of a 26-layer decode graph, nine in ten ask whether the model is still what was traced: classes,
attributes, every packed tensor. After a step has read all weights they come from memory, 1.5 to 2.5 ms per token.
Nothing changes the model between two tokens of one `generate()`, so there the first token of each graph evaluates
them all, and the next ones only the guards on what the call was given (inputs, KV cache, shapes, global state).

Calls outside `generate()` evaluate all guards, always. So does a graph that was broken into several, and after a
graph that changes the model itself every graph does again. What a streamer or a logits processor does to the model
while `generate()` runs counts from the next `generate()` on.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo import guards
from torch._dynamo.source import get_global_source_name, get_local_source_name

from unicorn_backend.integration import model_state, prepare


class OnceManager(guards.CheckFunctionManager):
    """Dynamo's guards of a frame, with those on the model behind a gate if the frame is ours.

    model_untouched: True if this graph is the whole frame and changes nothing that hangs on a module; None: find out
        from the trace.
    """

    def __init__(
        self, f_code: types.CodeType, output: Any, *args: Any, model_untouched: bool | None = None, **kwargs: Any
    ) -> None:
        self._ours = prepare.is_ours()
        self._torch_functions = torch._C._is_torch_function_enabled()
        self._frame_code = f_code
        if self._ours:
            self.model_untouched = _leaves_model_alone(output) if model_untouched is None else model_untouched
        super().__init__(f_code, output, *args, **kwargs)

    def compile_check_fn(self, builder: Any, guards_out: list[Any], guard_fail_fn: Any) -> None:
        mode_stack = self.torch_function_mode_stack  # dropped by the next line
        super().compile_check_fn(builder, guards_out, guard_fail_fn)
        if not self._ours:
            return
        if not self.model_untouched:
            self._add(_changes_model, "the graph changes the model")
            return
        everything = self.guard_manager.root
        output: Any = self.output_graph
        self.torch_function_mode_stack = mode_stack
        each_call = [guard for guard in guards_out if _is_of_the_call(guard.originating_source, output.local_scope)]
        builder, self.guard_manager = self.build_guards(
            each_call, self.guard_manager.diff_guard_sources, self._frame_code, output, False
        )
        super().compile_check_fn(builder, each_call, guard_fail_fn)
        self._add(_Gate(everything, self._torch_functions), "the model, a global or a function is not as it was traced")

    def _add(self, guard: Callable[[dict[str, Any]], bool], reason: str) -> None:
        root: Any = self.guard_manager.root
        root.add_epilogue_lambda_guard(guard, [reason], None)


class _Gate:
    """A guard that stands for all guards of a frame, and evaluates them once per state of the model."""

    def __init__(self, everything: Any, torch_functions: bool) -> None:
        self._everything, self._torch_functions = everything, torch_functions
        self._held_in: object | None = None  # kept alive, so that no later state can be taken for it

    def __call__(self, frame_locals: dict[str, Any]) -> bool:
        state = model_state.current()
        if state is not None and self._held_in is state:
            return True
        # Guards run with torch functions off, and one of `everything` asks whether they are on.
        with torch._C._EnableTorchFunction() if self._torch_functions else contextlib.nullcontext():
            holds = bool(self._everything.check(frame_locals))
        self._held_in = state if holds else None
        return holds


def _changes_model(frame_locals: dict[str, Any]) -> bool:
    """The guard of a graph that changes the model: whatever held before it need not hold after it."""
    model_state.changed()
    return True


def _is_of_the_call(source: Any, local_scope: dict[str, Any]) -> bool:
    """False for guards on modules, functions, classes and globals."""
    name = get_local_source_name(source)
    if name is None:
        return get_global_source_name(source) is None
    return not _is_code(local_scope.get(name))


def _is_code(value: Any) -> bool:
    return isinstance(value, (nn.Module, type, types.FunctionType, types.MethodType, types.ModuleType))


def _leaves_model_alone(output: Any) -> bool:
    """True if the trace `output` ended at the frame's return and changes only what the call was given."""
    reason, effects = getattr(output, "compile_subgraph_reason", None), getattr(output, "side_effects", None)
    if reason is None or reason.graph_break or effects is None:
        return False
    changed = [var.source for var in effects._get_modified_vars() if var.source is not None]
    return all(_is_of_the_call(source, output.local_scope) for source in changed)
