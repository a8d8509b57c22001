"""The three places where torch.compile itself must know about this backend.

They act only on contexts whose backend is ours, and are installed when Dynamo looks the backend up.

1. `OptimizeContext` (what every `torch.compile` call creates) gets an enter hook: sizes are dynamic
   from the first compile on (unless the user passed `dynamic=`), so that one prefill graph serves
   every prompt length and one decode graph every cache length; and a stock model is quantized
   before it is traced for the first time. With torch's default (static first, dynamic after a
   recompile) a dynamic cache costs 4 graphs instead of 2, about 2 s each for 6 layers.
2. `OptimizedModule.generate`: torch forwards it to the original module, whose own calls are not
   compiled, so that generate silently runs eager. Here the original module's calls are compiled.
3. What of a KV cache never changes for a model stays static: heads, head width, window. As symbols they
   cost 2 s of tracing and 0.8 ms of guards and arguments per token (26 layers).
"""

from __future__ import annotations

import functools
import logging
from logging import DEBUG
from typing import Any

import torch
from torch._dynamo import config
from torch._dynamo.eval_frame import OptimizeContext, OptimizedModule, innermost_backend
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.side_effects import side_effects_log
from torch._dynamo.variables import ConstantVariable, builder
from torch.fx.experimental import _config as shape_config
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatefulSymbolicContext

from unicorn_backend.integration import prepare
from unicorn_backend.options import Options

log = logging.getLogger(__name__)

# Graphs per model: prefill and decode for each cache class, for batch 1 and more, before and after
# a sliding window fills. torch's default of 8 would fall back to eager without a word.
RECOMPILE_LIMIT = 64

_MARK = "_unicorn_installed"
_OWNER = "_unicorn_context"  # on a compiled call: the context that generate() compiled it with


def install() -> None:
    """Install the hooks, once per process."""
    if getattr(OptimizeContext, _MARK, False):
        return
    _hook_context()
    _hook_sizes()
    OptimizedModule.generate = property(_generate)  # type: ignore[attr-defined]
    setattr(OptimizeContext, _MARK, True)


def options_of(context: Any) -> Options | None:
    """The options that `torch.compile` was called with, or None if its backend is not ours."""
    return options_of_callback(getattr(context, "callback", None))


def options_of_callback(callback: Any) -> Options | None:
    """The same for the compiler function that Dynamo was given."""
    from unicorn_backend.backend import unicorn

    backend = innermost_backend(callback) if callable(callback) else None
    kwargs = getattr(backend, "kwargs", {})
    if getattr(backend, "compiler_fn", backend) is not unicorn:
        return None
    return Options.parse(kwargs.get("options"))


def _hook_context() -> None:
    plain_init, plain_call = OptimizeContext.__init__, OptimizeContext.__call__

    @functools.wraps(plain_init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        plain_init(self, *args, **kwargs)
        options = options_of(self)
        if options is None:
            return
        self._unicorn_session = prepare.Session(options)
        changes: dict[str, Any] = {"recompile_limit": RECOMPILE_LIMIT, "specialize_float": True}
        if getattr(config, "side_effect_replay_policy", "") == "info" and not side_effects_log.isEnabledFor(DEBUG):
            # Messages on every cache update with formatted stacks, made and thrown away: 4 % of tracing 26 layers.
            changes["side_effect_replay_policy"] = "silent"
        if kwargs.get("dynamic") is None:
            changes["assume_static_by_default"] = False
        self.enter_exit_hooks.append(config._make_closure_patcher(**changes))
        # Two lengths that happen to be equal on the first call (a window and a full cache) are not the same length.
        self.enter_exit_hooks.append(shape_config._make_closure_patcher(use_duck_shape=False))
        self.enter_exit_hooks.append(self._unicorn_session.enter)

    @functools.wraps(plain_call)
    def __call__(self: Any, fn: Any) -> Any:
        session = getattr(self, "_unicorn_session", None)
        if session is not None:
            session.add_root(fn)
        return plain_call(self, fn)

    OptimizeContext.__init__ = __init__  # type: ignore[method-assign]
    OptimizeContext.__call__ = __call__  # type: ignore[method-assign]


def _hook_sizes() -> None:
    plain_tensor, plain_number = builder._automatic_dynamic, builder.VariableBuilder.wrap_symint

    @functools.wraps(plain_tensor)
    def _automatic_dynamic(e: Any, tx: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
        context = plain_tensor(e, tx, source, *args, **kwargs)
        cached = e.dim() == 4 and source.name.endswith((".keys", ".values"))
        if cached and prepare.is_ours() and isinstance(context, StatefulSymbolicContext):
            for dim in (1, 3):  # [B, heads, S, head width]
                context.dynamic_sizes[dim] = DimDynamic.STATIC
        return context

    @functools.wraps(plain_number)
    def wrap_symint(self: Any, value: int, *args: Any, **kwargs: Any) -> Any:
        if self.source.name.endswith(".sliding_window") and prepare.is_ours():
            self.install_guards(GuardBuilder.CONSTANT_MATCH)
            return ConstantVariable.create(value=value, source=self.source)
        return plain_number(self, value, *args, **kwargs)

    builder._automatic_dynamic = _automatic_dynamic
    builder.VariableBuilder.wrap_symint = wrap_symint  # type: ignore[method-assign]


def _generate(self: Any) -> Any:
    """`OptimizedModule.generate`: the original's, with its forward calls compiled if the backend is ours."""
    original: torch.nn.Module = self._orig_mod
    generate = getattr(original, "generate")  # noqa: B009  (AttributeError for modules that have none)
    compiled = original._compiled_call_impl  # ours from another torch.compile, maybe with other options, or the user's
    options = options_of(self.dynamo_ctx)
    if options is not None and getattr(compiled, _OWNER, None) is not self.dynamo_ctx:
        if compiled is not None and not hasattr(compiled, _OWNER):
            return generate
        original._compiled_call_impl = self.dynamo_ctx(original._call_impl)
        setattr(original._compiled_call_impl, _OWNER, self.dynamo_ctx)
        log.info("generate() of the compiled %s runs compiled", type(original).__name__)
    if options is not None and options.kv == "int8":
        from unicorn_backend.integration.int8_cache import with_int8_cache

        return with_int8_cache(generate, original.config)
    return generate
