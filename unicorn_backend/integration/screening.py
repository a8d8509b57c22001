"""The head's rows are screened where only the largest scores count.

Greedy decoding looks at one score of 262,144, top-k at k. From five bits of each weight and the norm of the rest it is
certain that most rows are not among them (`ops/impl/screen.inl`); only the others are read whole. What is looked at is
the same to the last bit, the other scores are -inf. It takes a copy of six of the head's eight bits.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from unicorn_backend import assets, measure
from unicorn_backend.integration import model_state

log = logging.getLogger(__name__)

LEAST_ROWS = 8192  # below, a head is in the cache
MOST_SCALE = 1e15  # so that no bound overflows
MOST_OF_RAM = 0.25  # of what is free

_screens: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # head's packed bytes -> (versions, Screen or None)


@contextlib.contextmanager
def one_call(model: Any, best: int) -> Iterator[None]:
    """Within this block, on this thread, only the `best` largest scores of `model`'s call are looked at. 0: all."""
    model_state.thread.best = _wanted(model, best)
    try:
        yield
    finally:
        model_state.thread.best = None


@contextlib.contextmanager
def loop(model: Any, best: int) -> Iterator[None]:
    """The same for each call between `begin_call` and `end_call`, which transformers' decoding loop comes by.

    What a streamer or a criterion asks of the model in between, it gets whole.
    """
    before = model_state.thread.best_in_loop
    model_state.thread.best_in_loop = _wanted(model, best)
    try:
        yield
    finally:
        model_state.thread.best_in_loop, model_state.thread.best = before, None


def begin_call(model: Any) -> None:
    """The decoding loop has prepared a call of `model`, and makes it next."""
    best = model_state.thread.best_in_loop
    model_state.thread.best = best if best is not None and best[0] is model else None


def end_call() -> None:
    """The decoding loop has made its call."""
    model_state.thread.best = None


def _wanted(model: Any, best: int) -> tuple[Any, int] | None:
    # A forward that is not transformers' own may look at all scores itself.
    plain = type(model).forward.__module__.startswith("transformers.")
    return (model, best) if best and plain else None


def screen(bound: Any) -> None:
    """Have a graph with its weights (`Bound` of ops/program.cpp) screen the head, where that is worth it."""
    weights = bound.head()
    if weights and (found := screen_of(weights)) is not None:
        bound.screen(found)


def screen_of(weights: Sequence[Tensor]) -> Any:
    """The planes of a packed head (a `Screen` of ops/screen.cpp), made the first time, or None with a reason logged."""
    packed = weights[0]
    version = [None if weight.is_inference() else weight._version for weight in weights]
    if packed not in _screens or _screens[packed][0] != version:
        if reason := _why_not(weights):
            log.info("the head is read whole: %s", reason)
        made = None if reason else torch.classes.unicorn.Screen(list(weights))
        _screens[packed] = (version, made)
    return _screens[packed][1]


@dataclass(frozen=True)
class Saved:
    """What calls for the largest scores read of a model's head, so far: all in bytes but `calls`."""

    head: int = 0
    read: int = 0
    calls: int = 0
    copied: int = 0  # high bits kept beside the head

    def per_call(self, since: Saved | None = None) -> int:
        """Bytes of the head that a call did not read, on average (since `since`)."""
        since = since or Saved()
        calls = self.calls - since.calls
        return self.head - (self.read - since.read) // calls if calls else 0


def saved(model: Any) -> Saved:
    """Of `model`, compiled or not; nothing where its head is read whole."""
    head = getattr(model, "_orig_mod", model).get_output_embeddings()
    packed = None if head is None else head._buffers.get("weight_packed")
    found = None if packed is None else _screens.get(packed, (None, None))[1]
    if packed is None or found is None:
        return Saved()
    read, calls = found.read()
    return Saved(packed.nbytes, read, calls, found.bytes())


def _why_not(weights: Sequence[Tensor]) -> str:
    scale = weights[1]
    if weights[0].shape[2] != 8 or scale.dtype != torch.float32:
        return "it has not 8 bits with a scale per row"
    if scale.numel() < LEAST_ROWS:
        return f"it has {scale.numel()} rows, and screening pays from {LEAST_ROWS} on"
    if not assets.isa().startswith("avx512"):
        return "without AVX-512 its bits cannot be put together as fast as they are read"
    if not bool(((scale >= 0) & (scale <= MOST_SCALE)).all()):
        return f"its scales are not all within 0 and {MOST_SCALE:g}"
    if torch.classes.unicorn.Arena.left(weights[0]):
        return "it stays in its file, as RAM is full"
    copied, free = weights[0].nbytes * 3 // 4, measure.ram()[1]
    if copied > MOST_OF_RAM * free:
        return f"a copy of its high bits, {copied / 1e6:.0f} MB, is too much for {free / 1e9:.1f} GB of RAM"
    return ""
