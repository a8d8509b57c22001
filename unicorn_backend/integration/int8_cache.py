"""A KV cache of int8 rows with a scale each: a little over half the memory and reads of bfloat16.

Any model may use it, compiled or not: `update` returns K and V in the dtype it got. In a compiled model
`unicorn::int8_attention` reads the rows themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from unicorn_backend.integration.transformers_hooks import cache_argument, growing_update, keep_all, keep_window


def _update(self: Any, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    dtype = key_states.dtype
    rows = [torch.ops.unicorn.quantize_rows(states) for states in (key_states, value_states)]
    keys, values = growing_update(self, rows[0], rows[1], self.visible)
    self.dtype = dtype
    return torch.ops.unicorn.dequantize_rows(keys, dtype), torch.ops.unicorn.dequantize_rows(values, dtype)


class Int8Layer(DynamicLayer):
    """All tokens of a layer; `keys` and `values` int8 [B, H, S, D + 4]."""

    update = _update
    visible = keep_all


class Int8SlidingLayer(DynamicSlidingWindowLayer):
    """The last tokens of a layer with a sliding window."""

    update = _update
    visible = keep_window


class Int8Cache(DynamicCache):
    """`model.generate(..., cache=Int8Cache(config=model.config))`; arguments of `DynamicCache`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for layer in self.layers:
            layer.__class__ = _quantized(type(layer))
        replicated: Any = getattr(self, "layer_class_to_replicate", None)  # of layers made on their first update
        if replicated is not None:
            self.layer_class_to_replicate = _quantized(replicated)


def _quantized(layer: type) -> type:
    known = {DynamicLayer: Int8Layer, DynamicSlidingWindowLayer: Int8SlidingLayer}
    if layer not in known:
        raise ValueError(f"kv='int8': got a model with {layer.__name__}; only full and sliding attention is supported")
    return known[layer]


def with_int8_cache(generate: Callable[..., Any], config: Any) -> Callable[..., Any]:
    """`generate` that uses an `Int8Cache` where the call names no cache of its own."""

    @functools.wraps(generate)
    def generate_int8(*args: Any, **kwargs: Any) -> Any:
        settings = kwargs.get("generation_config")
        named = kwargs.get("cache_implementation") or getattr(settings, "cache_implementation", None)
        given = kwargs.get("past_key_values", kwargs.get("cache"))
        if given is None and not named and kwargs.get("use_cache", True):
            kwargs[cache_argument()] = Int8Cache(config=config)
        return generate(*args, **kwargs)

    return generate_int8
