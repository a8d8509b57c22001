"""What a decode step gives the model, without working it out anew for every token of a `generate()`.

`prepare_inputs_for_generation` takes 85 us, half of it for `self.device`, which walks through the modules until one
has a parameter. For one new token of a dynamic cache it comes to the last id, the last position and the other
arguments as they are. With the first such token of each `generate()` both ways are gone and compared; only where they
agree is the short one taken for the others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unicorn_backend.integration import model_state

_PASSED_ON = ("use_cache", "logits_to_keep")  # behind the tensors, in the order of the arguments


def with_short_way(plain: Any, cache: str, is_ours: Callable[[Any], bool]) -> Any:
    """`GenerationMixin.prepare_inputs_for_generation`. cache: the name of that argument."""
    known = frozenset((*_PASSED_ON, "attention_mask", "position_ids", cache))

    @functools.wraps(plain)
    def prepare_inputs_for_generation(self: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        names = kwargs.keys()
        if args or kwargs.get("next_sequence_length") != 1 or not is_ours(self) or model_state.current() is None:
            return plain(self, input_ids, *args, **kwargs)
        if not names - {"next_sequence_length"} <= known or kwargs.get(cache) is None:
            return plain(self, input_ids, **kwargs)
        key = (prepare_inputs_for_generation, self, kwargs[cache], tuple(names))
        agreed = model_state.thread.held.get(key)
        if agreed:
            return _short(input_ids, cache, kwargs)
        inputs = plain(self, input_ids, **kwargs)
        if agreed is None:
            model_state.hold(key, _same(inputs, _short(input_ids, cache, kwargs)))
        return inputs

    return prepare_inputs_for_generation


def _short(input_ids: Tensor, cache: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The inputs for one token: in transformers' order, which guards may depend on."""
    inputs = {"input_ids": _last(input_ids), cache: kwargs[cache]}
    if (position_ids := kwargs.get("position_ids")) is not None:
        inputs["position_ids"] = position_ids if position_ids.shape[-1] == 1 else _last(position_ids)
    if (attention_mask := kwargs.get("attention_mask")) is not None:
        inputs["attention_mask"] = attention_mask
    return inputs | {name: value for name, value in kwargs.items() if name in _PASSED_ON}


def _last(tokens: Tensor) -> Tensor:
    return tokens[..., -1:].clone(memory_format=torch.contiguous_format)


def _same(inputs: Any, short: dict[str, Any]) -> bool:
    """True if both hold the same under the same names in the same order."""
    if type(inputs) is not dict or list(inputs) != list(short):
        return False
    return all(_equal(inputs[name], value) for name, value in short.items())


def _equal(a: Any, b: Any) -> bool:
    if a is b or not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a is b
    if (a.device, a.dtype, a.shape, a.stride()) != (b.device, b.dtype, b.shape, b.stride()):
        return False
    return bool(torch.equal(a, b))
