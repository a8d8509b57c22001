"""What a decode step gives the model, without working it out anew for every token of a `generate()`.

`prepare_inputs_for_generation` takes 85 us, half of it for `self.device`, which walks through the modules until one
has a parameter. For one new token of a dynamic cache it comes to the last id, the last position and the other
arguments as they are. `_update_model_kwargs_for_generation` takes 115 us for ten operators, where four append to the
mask and the positions. With the first such token of each `generate()` both ways are gone and compared; only where they
agree is the short one taken for the others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from unicorn_backend.integration import model_state, screening

_PASSED_ON = ("use_cache", "logits_to_keep")  # behind the tensors, in the order of the arguments
_KNOWN = {*_PASSED_ON, "attention_mask", "position_ids"}  # and the cache


def with_short_way(plain: Any, cache: str, is_ours: Callable[[Any], bool]) -> Any:
    """`GenerationMixin.prepare_inputs_for_generation`. cache: the name of that argument."""

    @functools.wraps(plain)
    def prepare_inputs_for_generation(self: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        screening.begin_call(self)
        whole = functools.partial(plain, self, input_ids, *args, **kwargs)
        given = {name: value for name, value in kwargs.items() if name != "next_sequence_length"}
        if args or kwargs.get("next_sequence_length") != 1 or not (is_ours(self) and _known(given, cache)):
            return whole()
        key = (prepare_inputs_for_generation, self, given[cache], tuple(given))
        return _the_shorter(key, whole, lambda: _short(input_ids, cache, given))

    return prepare_inputs_for_generation


def with_short_update(plain: Any, cache: str, is_ours: Callable[[Any], bool]) -> Any:
    """`GenerationMixin._update_model_kwargs_for_generation`."""

    @functools.wraps(plain)
    def _update_model_kwargs_for_generation(
        self: Any, outputs: Any, model_kwargs: dict[str, Any], is_encoder_decoder: bool = False, num_new_tokens: int = 1
    ) -> Any:
        screening.end_call()
        whole = functools.partial(plain, self, outputs, model_kwargs, is_encoder_decoder, num_new_tokens)
        if is_encoder_decoder or num_new_tokens != 1 or not (is_ours(self) and _known(model_kwargs, cache)):
            return whole()
        if outputs.get(cache) is not model_kwargs[cache]:
            return whole()
        key = (_update_model_kwargs_for_generation, self, model_kwargs[cache], tuple(model_kwargs))
        return _the_shorter(key, whole, lambda: _longer_by_one(model_kwargs))

    return _update_model_kwargs_for_generation


def _known(given: dict[str, Any], cache: str) -> bool:
    """True within `generate()`, for arguments that the short ways know."""
    known = given.get(cache) is not None and len(given.keys() - _KNOWN) == 1
    return known and model_state.current() is not None


def _the_shorter(key: Any, whole: Callable[[], Any], short: Callable[[], dict[str, Any]]) -> Any:
    """What `short` gives if that was what `whole` gives when both were asked; else what `whole` gives."""
    agreed = model_state.thread.held.get(key)
    if agreed:
        return short()
    shorter = short() if agreed is None else {}  # before `whole`, which may change what it is given
    result = whole()
    if agreed is None:
        model_state.hold(key, _same(result, shorter))
    return result


def _longer_by_one(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments for one more token."""
    longer = dict(kwargs)
    if (position_ids := kwargs.get("position_ids")) is not None:
        longer["position_ids"] = torch.cat([position_ids, position_ids[..., -1:] + 1], dim=-1)
    if (attention_mask := kwargs.get("attention_mask")) is not None:
        longer["attention_mask"] = functional.pad(attention_mask, (0, 1), value=1)
    return longer


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
