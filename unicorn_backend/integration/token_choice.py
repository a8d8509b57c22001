"""transformers' decoding loop with the native choice of tokens.

With a vocabulary of 262k the loop spends 0.3 ms per token in `torch.argmax`, or 15 ms when it samples. The loop stays
transformers' own, the same code object: it runs with other globals, in which `torch.argmax`, `softmax` and
`torch.multinomial` are those of `generation/choose.py`, and gives the same tokens; the criteria for its end are
`stopping.py`. Only models that this backend runs get it, and only where the loop calls these three as it does today.
"""

from __future__ import annotations

import functools
import inspect
import logging
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from unicorn_backend.generation.choose import Sampler, best_of, greedy
from unicorn_backend.integration.screening import loop as screened_loop

log = logging.getLogger(__name__)

_CALLS = (  # what the loop must contain, without spaces, exactly once
    "torch.argmax(next_token_scores,dim=-1)",
    "nn.functional.softmax(next_token_scores,dim=-1)",
    "torch.multinomial(probs,num_samples=1)",
    "logits_processor(input_ids,next_token_logits)",
)
_PARAMETERS = ("self", "input_ids", "logits_processor", "stopping_criteria", "generation_config")


class _Overlay:
    """A module with some names of its own."""

    def __init__(self, module: Any, **names: Any) -> None:
        self.__dict__.update(names)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def with_native_choice(loop: Any, is_ours: Callable[[Any], bool]) -> Any:
    """`GenerationMixin._sample` for the models that are ours, or `loop` itself where it is not the one known."""
    if reason := _unknown(loop):
        log.info("generate() chooses tokens by torch's operators: %s", reason)
        return loop
    from unicorn_backend.integration.stopping import Stopping  # transformers is loaded by now

    @functools.wraps(loop)
    def _sample(
        self: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **rest: Any
    ) -> Any:
        if not is_ours(self):
            return loop(self, input_ids, logits_processor, stopping_criteria, generation_config, **rest)
        sampler = Sampler(logits_processor, whole=bool(generation_config.output_scores))
        own = _in_globals(loop, _names(sampler))
        before = type(logits_processor)(sampler.before) if generation_config.do_sample else logits_processor
        seen = generation_config.output_logits or generation_config.output_scores
        best = 0 if seen else best_of(logits_processor, sampler if generation_config.do_sample else None)
        with screened_loop(self, best):
            return own(self, input_ids, before, Stopping(stopping_criteria), generation_config, **rest)

    return _sample


def _unknown(loop: Any) -> str:
    """Why `loop` is not taken, "" if it is."""
    if not inspect.isfunction(loop) or loop.__closure__ or hasattr(loop, "__wrapped__"):
        return "transformers' decoding loop is not a plain function"
    if tuple(inspect.signature(loop).parameters)[: len(_PARAMETERS)] != _PARAMETERS:
        return "transformers' decoding loop has other parameters"
    text = "".join(inspect.getsource(loop).split())
    missing = [call for call in _CALLS if text.count(call) != 1]
    return f"transformers' decoding loop has no single {missing[0]}" if missing else ""


def _in_globals(function: Any, names: dict[str, Any]) -> Any:
    """The same function with these names instead of its module's."""
    own = types.FunctionType(
        function.__code__, {**function.__globals__, **names}, function.__name__, function.__defaults__
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return own


def _names(sampler: Sampler) -> dict[str, Any]:
    """What the loop calls `torch` and `nn`. It gives `multinomial` what it got from `softmax`: the scores."""

    def argmax(scores: Tensor, dim: int) -> Tensor:
        return greedy(scores)

    def softmax(scores: Tensor, dim: int) -> Tensor:
        return scores

    def multinomial(scores: Tensor, num_samples: int) -> Tensor:
        return sampler(_NO_IDS, scores)

    own_torch = _Overlay(torch, argmax=argmax, multinomial=multinomial)
    return {"torch": own_torch, "nn": _Overlay(torch.nn, functional=_Overlay(functional, softmax=softmax))}


_NO_IDS = torch.empty(0, 0, dtype=torch.long)  # top-k and top-p do not look at the tokens so far
