"""Keys and values that outlive a request, so that a prompt recomputes only what no earlier one had.

A `PrefixStore` keeps the caches of the latest conversations with their token ids. A new prompt takes the one with
which it shares most tokens from the start, cut back to them. Sliding layers keep all their rows as long as the
budget allows (transformers: the window only, so that nothing can be taken back); attention still sees the window.

Cutting and forking cost no copy: rows of a cache are never overwritten while a tensor shows them (`ops/cache.cpp`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from unicorn_backend import table

SLACK = 64
"""Rows beyond the window that a trimmed sliding layer keeps: as many tokens can be taken back."""

LEAST = 2
"""Rows worth reusing: torch compiles a graph of its own for a cache of one row, which takes seconds."""


def new_cache(model: Any) -> Any:
    """An empty cache for a model, of the kind its option `kv` names; sliding layers remember what left their window."""
    from transformers import DynamicCache

    from unicorn_backend.integration.int8_cache import Int8Cache
    from unicorn_backend.integration.torch_hooks import options_of

    options = options_of(getattr(model, "dynamo_ctx", None))
    kind = Int8Cache if options is not None and options.kv == "int8" else DynamicCache
    cache = kind(config=getattr(model, "_orig_mod", model).config)
    cache.activate_past_recording()
    return cache


def fork(cache: Any) -> Any:
    """A second cache with the same rows; the two grow apart."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin


def cut(cache: Any, tokens: int) -> str:
    """Drop the last `tokens` tokens in place. Returns why that is impossible ("" if it was done)."""
    if tokens == 0:
        return ""
    for layer in cache.layers:
        if reason := _why_not(layer, tokens):
            return reason
    for layer in cache.layers:
        if not layer.is_initialized:  # it shares the keys of another layer
            continue
        rows = layer.keys.shape[2] - tokens
        layer.keys, layer.values = (
            torch.ops.unicorn.last_rows(t[:, :, :rows], rows) for t in (layer.keys, layer.values)
        )
        if layer.is_sliding:
            layer.cumulative_length -= tokens
    return ""


def growing_layers() -> tuple[type, ...]:
    """Kinds of cache layers that hold the rows [B, H, S, D] of their latest tokens, and nothing else."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    from unicorn_backend.integration.int8_cache import Int8Layer, Int8SlidingLayer

    return DynamicLayer, Int8Layer, DynamicSlidingWindowLayer, Int8SlidingLayer


def _why_not(layer: Any, tokens: int) -> str:
    if not layer.is_initialized or (type(layer) in growing_layers() and not layer.is_sliding):
        return ""
    if type(layer) not in growing_layers():
        return f"a layer keeps its past as {type(layer).__name__}, which cannot be cut"
    seen, held = layer.cumulative_length, layer.keys.shape[2]
    needed = min(seen - tokens, layer.sliding_window - 1)
    if held - tokens < needed:
        return f"a window of {layer.sliding_window} tokens has moved on by {tokens} and keeps {held}"
    return ""


def trim(cache: Any) -> None:
    """Drop the rows of sliding layers that are out of the window, but for `SLACK`."""
    for layer in cache.layers:
        if layer.is_initialized and layer.is_sliding:
            keep = layer.sliding_window - 1 + SLACK
            if layer.keys.shape[2] > keep:  # copied: a view would keep the memory of all rows
                layer.keys, layer.values = (t[:, :, -keep:].clone() for t in (layer.keys, layer.values))


def size_bytes(cache: Any) -> int:
    """Bytes of the rows that a cache shows."""
    layers = [layer for layer in cache.layers if layer.is_initialized]
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


def common_length(a: np.ndarray, b: np.ndarray) -> int:
    """Number of equal tokens at the start of two id arrays."""
    shorter = min(len(a), len(b))
    different = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(different[0]) if len(different) else shorter


@dataclass
class Taken:
    """What a prompt got: a cache to go on with, how much of the prompt it covers, and why not more."""

    cache: Any
    reused: int
    note: str


@dataclass(eq=False)
class _Entry:
    ids: np.ndarray
    cache: Any
    bytes: int


@dataclass
class PrefixStore:
    """Caches of the latest conversations, least recently used first out. Not thread-safe: one worker owns it.

    budget_bytes: keys and values kept between requests; 0 keeps none.
    """

    model: Any
    budget_bytes: int = 1 << 30
    _entries: list[_Entry] = field(default_factory=list)  # latest last

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self._entries)

    def take(self, ids: Sequence[int]) -> Taken:
        """A cache for a prompt: the longest known prefix of it, always without its last token."""
        prompt = np.asarray(ids, np.int64)
        best, common = None, 0
        for entry in self._entries:
            length = common_length(entry.ids, prompt)
            if length > common:
                best, common = entry, length
        common = min(common, len(prompt) - 1)
        if best is None or common < LEAST:
            return Taken(new_cache(self.model), 0, "nothing of this prompt is known")
        whole = common >= len(best.ids)
        cache = best.cache if whole else fork(best.cache)
        reason = cut(cache, len(best.ids) - common)
        if reason:
            return Taken(new_cache(self.model), 0, f"recomputed: {reason}")
        if whole:
            self._entries.remove(best)
        note = "" if whole else f"history differs after {common} of {len(best.ids)} known tokens"
        return Taken(cache, common, note)

    def put(self, ids: Sequence[int], cache: Any) -> None:
        """Keep a cache; `ids` are the tokens of its rows (more are ignored)."""
        seen = cache.get_seq_length()
        if seen == 0 or self.budget_bytes == 0:
            return
        if size_bytes(cache) > self.budget_bytes:
            trim(cache)
        entry = _Entry(np.asarray(ids[:seen], np.int64), cache, size_bytes(cache))
        self._entries = [e for e in self._entries if common_length(e.ids, entry.ids) < len(e.ids)]
        self._entries.append(entry)
        while self._entries and self.bytes > self.budget_bytes:
            self._entries.pop(0)

    def describe(self) -> str:
        """One line: how much is kept."""
        return f"{len(self)} conversations kept, {table.size(self.bytes)} of at most {table.size(self.budget_bytes)}"

    def clear(self) -> None:
        self._entries.clear()
