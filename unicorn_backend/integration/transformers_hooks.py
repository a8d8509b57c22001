"""Cache layers without branches on the length, so that one graph serves every length; masks without vmap.

transformers' sliding layers ask in Python whether the window is full, whether it fills on this
update, and so on; Dynamo turns each answer into a guard and compiles again: 5 decode graphs
instead of 1 for a dynamic cache that passes its window, 3 for a static one. The versions here compute
the same values with min and max. They are installed when the backend is first used, if a self-test
against the originals passes (`_agrees`); else transformers stays as it is and the log says so.

Dynamic layers do so, and grow in place, only while they are being compiled; eager calls stay transformers' own.
The order of the cached tokens, the shapes reported to the mask code and every returned value are
those of transformers, except that a static layer returns only the visible past for several new
tokens at once (transformers: the whole buffer, with a mask that hides the rest).
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unicorn_backend.integration.decode_inputs import with_short_update, with_short_way
from unicorn_backend.integration.model_state import wrap_generate
from unicorn_backend.integration.token_choice import with_native_choice

log = logging.getLogger(__name__)


@functools.cache
def cache_argument() -> str:
    """The name of the KV cache among the arguments of models and of `generate`: from transformers 5.24 on "cache"."""
    from transformers import GenerationMixin

    parameters = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def install(is_ours: Callable[[Any], bool]) -> bool:
    """Replace the methods, once, if transformers' caches are loaded and the self-test passes.

    is_ours: whether this backend was asked to run a model.
    """
    caches: Any = sys.modules.get("transformers.cache_utils")
    masks: Any = sys.modules.get("transformers.masking_utils")
    if caches is None or masks is None or getattr(caches, "_unicorn_installed", False):
        return False
    full, sliding, static = caches.DynamicLayer, caches.DynamicSlidingWindowLayer, caches.StaticSlidingWindowLayer
    layers: tuple[tuple[Any, Any, dict[str, int]], ...] = (
        (full, _full_methods, {}),
        (sliding, _sliding_methods, {"sliding_window": 4}),
        (static, _static_methods, {"max_cache_len": 9, "sliding_window": 4}),
    )
    for layer, methods, sizes in layers:
        tested: Any = type("_Tested", (layer,), methods(layer, eager=True))
        if _agrees(functools.partial(layer, **sizes), functools.partial(tested, **sizes)):
            continue
        log.warning(
            "transformers %s changed its caches: expect up to 4 more graphs when a window fills, and slower decoding",
            sys.modules["transformers"].__version__,
        )
        return False
    for layer, methods, _ in layers:
        for name, method in methods(layer, eager=False).items():
            setattr(layer, name, method)
    for layer in (full, sliding):
        _hook_crop(layer)
    _hook_mask_skip(masks)
    _hook_mask_vmap(masks)
    generation: Any = sys.modules["transformers"].GenerationMixin
    generation.generate = wrap_generate(generation.generate)
    generation._sample = with_native_choice(generation._sample, is_ours)
    for name, shorter in (
        ("prepare_inputs_for_generation", with_short_way),
        ("_update_model_kwargs_for_generation", with_short_update),
    ):
        setattr(generation, name, shorter(getattr(generation, name), cache_argument(), is_ours))
    caches._unicorn_installed = True
    return True


def _growing(layer: type, visible: Any, *, eager: bool) -> dict[str, Any]:
    """`update` of a dynamic layer: `append_rows` in place of a copy of the whole cache per token.

    `visible(self, tokens)` -> how many of the latest rows are kept, and how many are returned.
    eager: False leaves calls that are not being compiled to transformers.
    """
    plain = layer.update  # type: ignore[attr-defined]

    def update(self: Any, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        ours = key_states.device.type == "cpu" and not (torch.is_grad_enabled() and key_states.requires_grad)
        if not (ours and (eager or torch.compiler.is_compiling())):
            result: tuple[Tensor, Tensor] = plain(self, key_states, value_states, *args, **kwargs)
            return result
        return growing_update(self, key_states, value_states, functools.partial(visible, self))

    return {"update": update}


def growing_update(self: Any, key_states: Tensor, value_states: Tensor, visible: Any) -> tuple[Tensor, Tensor]:
    """Append to a layer's rows. `visible(tokens)` -> how many of the latest are kept, and how many are returned."""
    grown = []
    tokens = key_states.shape[-2]
    keep, shown = visible(tokens)
    for past, new in ((self.keys, key_states), (self.values, value_states)):
        if self.is_initialized and past.dim() == new.dim():
            grown.append(torch.ops.unicorn.append_rows(past, new, past.shape[-2], past.shape[-2]))
        else:
            grown.append(torch.ops.unicorn.last_rows(new, tokens))
    if not self.is_initialized:  # what lazy_initialization does, without making empty tensors
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
    if keep is None:
        self.keys, self.values = grown
    else:
        self.keys, self.values = (torch.ops.unicorn.last_rows(t, keep) for t in grown)
    if shown is None:
        return grown[0], grown[1]
    return torch.ops.unicorn.last_rows(grown[0], shown), torch.ops.unicorn.last_rows(grown[1], shown)


def keep_all(self: Any, tokens: int) -> tuple[int | None, int | None]:
    """What a full layer keeps and shows: everything."""
    return None, None


def keep_window(self: Any, tokens: int) -> tuple[int | None, int | None]:
    """What a sliding layer keeps and shows."""
    self.cumulative_length += tokens
    past = self.sliding_window - 1
    return (None, past + tokens) if self.record_past else (past, None)


def _full_methods(layer: type, *, eager: bool) -> dict[str, Any]:
    return _growing(layer, keep_all, eager=eager)


def _sliding_methods(layer: type, *, eager: bool) -> dict[str, Any]:
    def get_mask_sizes(self: Any, query_length: int) -> tuple[int, int]:
        past = self.sliding_window - 1
        return min(self.cumulative_length, past) + query_length, max(self.cumulative_length - past, 0)

    return {**_growing(layer, keep_window, eager=eager), "get_mask_sizes": get_mask_sizes}


def _hook_crop(layer: Any) -> None:
    """`crop` slices, and a slice with an offset is another graph: its rows are shown as a tensor of their own."""
    plain = layer.crop

    def crop(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        if self.is_initialized and self.keys.dim() == 4 and self.keys.device.type == "cpu":
            self.keys = torch.ops.unicorn.last_rows(self.keys, self.keys.shape[2])
            self.values = torch.ops.unicorn.last_rows(self.values, self.values.shape[2])

    layer.crop = crop


def _static_methods(layer: type, *, eager: bool) -> dict[str, Any]:
    def update(self: Any, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens, seen = key_states.shape[-2], self.cumulative_length_int
        self.cumulative_length_int = seen + tokens
        self.cumulative_length.add_(tokens)
        if tokens == 1:
            torch.ops.unicorn.push_window_(self.keys, key_states, seen)
            torch.ops.unicorn.push_window_(self.values, value_states, seen)
            return self.keys, self.values
        return (
            _append(self.keys, key_states, seen, self.max_cache_len),
            _append(self.values, value_states, seen, self.max_cache_len),
        )

    def get_mask_sizes(self: Any, query_length: int) -> tuple[int, int]:
        length, seen = self.max_cache_len, self.cumulative_length_int
        offset = max(seen - length + 1, 0)
        return (length if query_length == 1 else min(seen, length - 1) + query_length), offset

    return {"update": update, "get_mask_sizes": get_mask_sizes}


def _append(cache: Tensor, new: Tensor, seen: int, length: int) -> Tensor:
    """Append several tokens to a window buffer in place; returns the visible past and the new tokens."""
    if seen == 0:
        full = new
    else:
        full = torch.ops.unicorn.append_rows(cache, new, min(seen, length), length - 1)
    torch.ops.unicorn.set_window_(cache, full)
    return full


def _hook_mask_skip(masks: Any) -> None:
    """Sliding layers always get a mask: whether it could be skipped depends on the length."""
    plain = masks._ignore_causal_mask_sdpa

    def _ignore_causal_mask_sdpa(*args: Any, **kwargs: Any) -> Any:
        local = kwargs.get("local_attention_size", args[5] if len(args) > 5 else None)
        return False if local is not None else plain(*args, **kwargs)

    masks._ignore_causal_mask_sdpa = _ignore_causal_mask_sdpa


def _hook_mask_vmap(masks: Any) -> None:
    """Compiled masks of image tokens by broadcasting: a vmap cannot be traced to operators.

    transformers has both forms, and vmaps whatever is not its own because a function may do more than index and
    compare. Such a function gives a result of fewer than 4 dimensions for indices of 4; it stays vmapped.
    """
    if not all(hasattr(masks, name) for name in ("_vmap_expansion_sdpa", "_non_vmap_expansion_sdpa")):
        return
    plain, index = masks._vmap_expansion_sdpa, masks._non_vmap_expansion_sdpa

    def broadcast(mask_function: Any) -> Any:
        def mask(*aranges: Tensor) -> Tensor:
            whole: Tensor = mask_function(*index(*aranges))
            if whole.dim() != 4:
                whole = plain(mask_function)(*aranges)
            return whole.expand([positions.shape[0] for positions in aranges])

        return mask

    def _vmap_expansion_sdpa(mask_function: Any) -> Any:
        return broadcast(mask_function) if torch.compiler.is_compiling() else plain(mask_function)

    groups = torch.tensor([[-1, 0, 0, -1, 1], [0, 0, -1, 1, 1]])
    window = masks.and_masks(masks.sliding_window_overlay(3), masks.causal_mask_function)
    example = masks.or_masks(window, masks.blockwise_overlay(groups))
    aranges = torch.arange(2), torch.arange(1), torch.arange(5), torch.arange(5)
    with masks.TransformGetItemToIndex():
        same = torch.equal(plain(example)(*aranges), broadcast(example)(*aranges))
    if same:
        masks._vmap_expansion_sdpa = _vmap_expansion_sdpa
    else:
        log.warning("transformers changed its masks: prompts with images run as plain torch")


def _agrees(make_old: Any, make_new: Any) -> bool:
    """Same cached tokens, mask sizes and visible keys as the original over updates of every kind."""
    for lengths in ((3, 1, 1, 1, 1), (1, 1, 1, 1, 1, 1), (4, 1, 2), (7, 1, 1), (2, 3, 4, 1), (9, 5)):
        old, new = make_old(), make_new()
        position = 0
        for count in lengths:
            states = torch.arange(position, position + count, dtype=torch.float32).view(1, 1, count, 1)
            if not _same_update(old, new, states, position):
                return False
            position += count
    return True


def _same_update(old: Any, new: Any, states: Tensor, position: int) -> bool:
    count = states.shape[2]
    (old_length, old_offset), (new_length, new_offset) = old.get_mask_sizes(count), new.get_mask_sizes(count)
    old_keys, new_keys = old.update(states, states)[0], new.update(states.clone(), states.clone())[0]
    if (old_keys.shape[2], new_keys.shape[2]) != (old_length, new_length) or old_offset != new_offset:
        return False
    valid = min(old_length, position + count - old_offset)  # beyond: never written, masked out
    same_view = torch.equal(old_keys[:, :, :valid], new_keys[:, :, :valid])
    written = min(position + count, old.keys.shape[2])
    return same_view and torch.equal(old.keys[:, :, :written], new.keys[:, :, :written])
