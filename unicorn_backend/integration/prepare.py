"""What happens to a model before its first trace: quantize the weights, fuse the norms.

The model is known when `torch.compile` is called with a module or one of its methods (`Session`).
For a plain function that closes over a model it is found from the parameters in the graph, and
Dynamo is asked to trace once more (`quantize_owners`).
"""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from unicorn_backend.integration import transformers_hooks
from unicorn_backend.integration.norms import fuse_norm_modules
from unicorn_backend.options import Options
from unicorn_backend.plan import Plan
from unicorn_backend.quantize.memory import into_huge_pages
from unicorn_backend.quantize.modules import QuantEmbedding, QuantLinear
from unicorn_backend.quantize.recipe import NONE
from unicorn_backend.quantize.rewrite import is_language_model, quantize
from unicorn_backend.table import size

log = logging.getLogger(__name__)

_lock = threading.RLock()
_current = threading.local()
_plans: weakref.WeakKeyDictionary[nn.Module, list[Plan]] = weakref.WeakKeyDictionary()
_notes: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
_all_roots: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # modules that some session was applied to


def _current_roots() -> tuple[nn.Module, ...]:
    """Modules of the compiled call that this thread is in."""
    roots: tuple[nn.Module, ...] = getattr(_current, "roots", ())
    return roots


def is_ours() -> bool:
    """True while this thread is in a call that was compiled with this backend."""
    return getattr(_current, "ours", False)


class Session:
    """One `torch.compile` context: its options, and the modules it was applied to."""

    def __init__(self, options: Options) -> None:
        transformers_hooks.install(_all_roots.__contains__)
        self.options = options
        self._roots: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._prepared: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def add_root(self, fn: Any) -> None:
        """Remember the module behind `fn`: a module, or a bound method of one."""
        owner = fn if isinstance(fn, nn.Module) else getattr(fn, "__self__", None)
        if isinstance(owner, nn.Module):
            self._roots.add(owner)
            _all_roots.add(owner)

    def enter(self) -> Callable[[], None]:
        """Enter hook of every compiled call; returns what undoes it."""
        before = _current_roots(), is_ours()
        _current.roots, _current.ours = tuple(self._roots), True
        for root in _current.roots:
            if root not in self._prepared and prepare(root, self.options):
                self._prepared.add(root)

        def leave() -> None:
            _current.roots, _current.ours = before

        return leave


def prepare(root: nn.Module, options: Options) -> bool:
    """Quantize `root` in place if it is to be, and fuse its norms. False: not now (gradients)."""
    if (note := _not_now(root)) is not None:
        _notes[root] = note
        return False
    with _lock:
        recipe = _recipe_for(root, options)
        if recipe is None:
            return True
        if recipe != NONE:
            quantize(root, recipe, keep_weights=options.keep_weights)
        fused = fuse_norm_modules(root)
        placement = into_huge_pages(root)
    if placement.left:
        log.warning(
            "%s of %s of packed weights stay in their file, as RAM has no room for them: where not cached, they are "
            "read from the disk by every call of the model; fewer bits per weight (`unicorn quantize --recipe`) would "
            "be faster",
            size(placement.left),
            size(placement.left + placement.moved),
        )
    _notes.pop(root, None)
    log.info("prepared %s: recipe %s, %d norms fused", type(root).__name__, recipe, fused)
    return True


def _not_now(root: nn.Module) -> str | None:
    if root.training:
        return "the model is in training mode: left unquantized; call model.eval() for inference"
    if torch.is_grad_enabled() and any(p.requires_grad for p in root.parameters()):
        return "gradients are required: left unquantized"
    if any(p.grad is not None for p in root.parameters()):
        return "parameters hold gradients (a training loop): left unquantized"
    return None


def _recipe_for(root: nn.Module, options: Options) -> str | None:
    """The recipe to apply, "none" to apply none but still fuse, or None to leave the module alone."""
    if any(isinstance(module, (QuantLinear, QuantEmbedding)) for module in root.modules()):
        return options.recipe if options.recipe not in (None, NONE) else NONE
    if options.recipe is not None:
        return options.recipe
    yes, reason = is_language_model(root)
    if not yes:
        _notes[root] = (
            f"not a language model ({reason}): weights left as they are (options={{'recipe': ...}} forces one)"
        )
        return None
    return "default"


def has_quantized(example_inputs: Sequence[Any]) -> bool:
    """True if a packed weight is among the inputs of a graph."""
    return any(isinstance(value, torch.Tensor) and value.dtype == torch.uint8 for value in example_inputs)


def reason_for_nothing() -> str:
    """Why the module that is being compiled was left alone, if that was decided before tracing."""
    notes = [_notes[root] for root in _current_roots() if root in _notes]
    return "; ".join(notes)


def quantize_owners(options: Options, regions: Sequence[Any], gm: GraphModule, example_inputs: Sequence[Any]) -> None:
    """For a compiled function: quantize the module that owns the regions' float weights, and trace again.

    Does nothing where the module was known beforehand (its fate is decided), for recipe "none", and
    where no module owns the weights.
    """
    if options.recipe == NONE or _current_roots():
        return
    by_node = dict(zip((n for n in gm.graph.nodes if n.op == "placeholder"), example_inputs, strict=True))
    weights = [by_node.get(w) for region in regions for linear in region.linears for w in linear.weights]
    floats = [w for w in weights if isinstance(w, nn.Parameter) and w.is_floating_point()]
    root = _owner(floats)
    if root is None or root in _notes or not prepare(root, options) or root in _notes:
        return
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis, UnspecializeRestartAnalysis

    # Dynamo lets the first kind through from a backend; the second makes it forget what it speculated while
    # tracing modules that are other modules now.
    restart = type("QuantizedInPlace", (TensorifyScalarRestartAnalysis, UnspecializeRestartAnalysis), {})
    raise restart(restart_reason="unicorn quantized the model in place")


def _owner(parameters: Sequence[nn.Parameter]) -> nn.Module | None:
    """The outermost live module that holds all of `parameters`."""
    if not parameters:
        return None
    wanted = {id(p) for p in parameters}
    best: nn.Module | None = None
    for thing in gc.get_objects():
        if not issubclass(type(thing), nn.Module):  # isinstance would follow weak proxies, some of them dead
            continue
        if wanted <= {id(p) for p in thing.parameters()} and (best is None or _contains(thing, best)):
            best = thing
    return best


def _contains(outer: nn.Module, inner: nn.Module) -> bool:
    return any(module is inner for module in outer.modules())


def remember_plan(plan: Plan) -> None:
    """Keep `plan` for `explain`, under every module that is being compiled."""
    for root in _current_roots():
        _plans.setdefault(root, []).append(plan)


def plans_of(root: nn.Module) -> list[Plan]:
    """Plans of the graphs compiled for `root` so far."""
    return list(_plans.get(root, []))


def forget_plans() -> None:
    _plans.clear()
