"""Sliding-window cache layers without branches on the length, so that one graph serves every length.

transformers' sliding layers ask in Python whether the window is full, whether it fills on this
update, and so on; Dynamo turns each answer into a guard and compiles again: 5 decode graphs
instead of 1 for a dynamic cache that passes its window, 3 for a static one. The versions here compute
the same values with min and max. They are installed when the backend is first used, if a self-test
against the originals passes (`_agrees`); else transformers stays as it is and the log says so.

The order of the cached tokens, the shapes reported to the mask code and every returned value are
those of transformers, except that a static layer returns only the visible past for several new
tokens at once (transformers: the whole buffer, with a mask that hides the rest).
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch
from torch import Tensor

from unicorn_backend import ops

log = logging.getLogger(__name__)

# push_window_: cache [B, H, L, D] holds the last min(seen, L) tokens in order; appends new [B, H, 1, D],
# dropping the oldest token if it is full. In place.
ops.LIBRARY.define("push_window_(Tensor(a!) cache, Tensor new, SymInt seen) -> ()")

# window_cat: past [B, H, S, D] of which the first `filled` rows are written, new [B, H, T, D]
# -> [B, H, min(filled, keep) + T, D], contiguous: the last `keep` written rows, then the new ones.
ops.LIBRARY.define("window_cat(Tensor past, Tensor new, SymInt filled, SymInt keep) -> Tensor")

# set_window_: the last min(S, L) rows of full [B, H, S, D] become the first rows of cache [B, H, L, D].
ops.LIBRARY.define("set_window_(Tensor(a!) cache, Tensor full) -> ()")

# last_rows: x [B, H, S, D] -> a contiguous copy of its last min(S, count) rows.
ops.LIBRARY.define("last_rows(Tensor x, SymInt count) -> Tensor")


def _push_window(cache: Tensor, new: Tensor, seen: int) -> None:
    length = cache.shape[2]
    if seen >= length:
        cache.copy_(cache.roll(-1, 2))
    cache[:, :, min(seen, length - 1)] = new[:, :, 0]


def _window_cat(past: Tensor, new: Tensor, filled: int, keep: int) -> Tensor:
    return torch.cat([past[:, :, max(filled - keep, 0) : filled], new], dim=2)


def _set_window(cache: Tensor, full: Tensor) -> None:
    rows = min(full.shape[2], cache.shape[2])
    cache[:, :, :rows] = full[:, :, full.shape[2] - rows :]


def _last_rows(x: Tensor, count: int) -> Tensor:
    return x[:, :, max(x.shape[2] - count, 0) :].clone(memory_format=torch.contiguous_format)


def _window_cat_fake(past: Tensor, new: Tensor, filled: int, keep: int) -> Tensor:
    rows = torch.sym_min(filled, keep) + new.shape[2]
    return new.new_empty((new.shape[0], new.shape[1], rows, new.shape[3]))


def _last_rows_fake(x: Tensor, count: int) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], torch.sym_min(x.shape[2], count), x.shape[3]))


_KERNELS: dict[str, Any] = {
    "push_window_": _push_window,
    "window_cat": _window_cat,
    "set_window_": _set_window,
    "last_rows": _last_rows,
}
for _name, _kernel in _KERNELS.items():
    torch.library.impl(ops.LIBRARY, _name, "CompositeExplicitAutograd")(_kernel)
torch.library.register_fake("unicorn::push_window_", lambda cache, new, seen: None, lib=ops.LIBRARY)
torch.library.register_fake("unicorn::set_window_", lambda cache, full: None, lib=ops.LIBRARY)
torch.library.register_fake("unicorn::window_cat", _window_cat_fake, lib=ops.LIBRARY)
torch.library.register_fake("unicorn::last_rows", _last_rows_fake, lib=ops.LIBRARY)


def install() -> bool:
    """Replace the methods, once, if transformers' caches are loaded and the self-test passes."""
    caches: Any = sys.modules.get("transformers.cache_utils")
    masks: Any = sys.modules.get("transformers.masking_utils")
    if caches is None or masks is None or getattr(caches, "_unicorn_installed", False):
        return False
    dynamic, static = caches.DynamicSlidingWindowLayer, caches.StaticSlidingWindowLayer
    new_dynamic: Any = type("_Dynamic", (dynamic,), _dynamic_methods())
    new_static: Any = type("_Static", (static,), _static_methods())
    same_dynamic = _agrees(lambda: dynamic(4), lambda: new_dynamic(4))
    if not (same_dynamic and _agrees(lambda: static(9, 4), lambda: new_static(9, 4))):
        log.warning(
            "transformers %s changed its sliding-window caches: expect up to 4 more graphs when a window fills",
            sys.modules["transformers"].__version__,
        )
        return False
    for old, new in ((dynamic, new_dynamic), (static, new_static)):
        old.update, old.get_mask_sizes = new.update, new.get_mask_sizes
    for layer in (caches.DynamicLayer, dynamic):
        _hook_crop(layer)
    _hook_mask_skip(masks)
    caches._unicorn_installed = True
    return True


def _dynamic_methods() -> dict[str, Any]:
    """The layer keeps `sliding_window` tokens (transformers: one fewer), so that no update slices a view."""

    def update(self: Any, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        tokens, past = key_states.shape[-2], self.sliding_window - 1
        keep = self.cumulative_length + tokens if self.record_past else past
        if self.is_initialized and self.keys.dim() == key_states.dim():
            filled = self.keys.shape[2]
            keys = torch.ops.unicorn.window_cat(self.keys, key_states, filled, keep)
            values = torch.ops.unicorn.window_cat(self.values, value_states, filled, keep)
        else:
            self.lazy_initialization(key_states, value_states)
            keys, values = key_states, value_states
        self.cumulative_length += tokens
        self.keys, self.values = keys, values
        if self.record_past:
            keys, values = (torch.ops.unicorn.last_rows(t, past + tokens) for t in (keys, values))
        elif tokens > 1:
            self.keys, self.values = (torch.ops.unicorn.last_rows(t, past + 1) for t in (keys, values))
        return keys, values

    def get_mask_sizes(self: Any, query_length: int) -> tuple[int, int]:
        past = self.sliding_window - 1
        return min(self.cumulative_length, past) + query_length, max(self.cumulative_length - past, 0)

    return {"update": update, "get_mask_sizes": get_mask_sizes}


def _hook_crop(layer: Any) -> None:
    """`crop` leaves views; a view and a whole tensor are two graphs, so what stays is made whole."""
    plain = layer.crop

    def crop(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        if self.is_initialized:
            self.keys, self.values = self.keys.contiguous(), self.values.contiguous()

    layer.crop = crop


def _static_methods() -> dict[str, Any]:
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
        full = torch.ops.unicorn.window_cat(cache, new, min(seen, length), length - 1)
    torch.ops.unicorn.set_window_(cache, full)
    return full


def _hook_mask_skip(masks: Any) -> None:
    """Sliding layers always get a mask: whether it could be skipped depends on the length."""
    plain = masks._ignore_causal_mask_sdpa

    def _ignore_causal_mask_sdpa(*args: Any, **kwargs: Any) -> Any:
        local = kwargs.get("local_attention_size", args[5] if len(args) > 5 else None)
        return False if local is not None else plain(*args, **kwargs)

    masks._ignore_causal_mask_sdpa = _ignore_causal_mask_sdpa


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
    extra = 0 if hasattr(old, "max_cache_len") else new.keys.shape[2] - old.keys.shape[2]
    return same_view and torch.equal(old.keys[:, :, :written], new.keys[:, :, extra : extra + written])
