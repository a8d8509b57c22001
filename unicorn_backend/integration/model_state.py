"""Spans of time in which nothing outside the compiled graphs changes the model: see `guards_once.py`."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any


class _Thread(threading.local):
    """What the calling thread knows of the state that the model is in."""

    state: object | None = None
    held: Mapping[Any, Any] = MappingProxyType({})  # graphs with their weights, while the state lasts: weights_once.py
    # Of this model's next call only so many of the largest scores are looked at, and of each one that the decoding loop
    # makes: screening.py
    best: tuple[Any, int] | None = None
    best_in_loop: tuple[Any, int] | None = None


thread = _Thread()


def current() -> object | None:
    """What stands for the state that the model is in, or None where anybody may change it at any time."""
    return thread.state


@contextlib.contextmanager
def one_state() -> Iterator[None]:
    """Within this block only compiled graphs change the model (as far as this thread is concerned)."""
    before = thread.state, thread.held
    _begin()
    try:
        yield
    finally:
        thread.state, thread.held = before


def changed() -> None:
    """A compiled graph is about to change the model."""
    if current() is not None:
        _begin()


def hold(key: Any, value: Any) -> None:
    """Keep `value` in `thread.held` until the model's state ends; without a state it is not kept."""
    if isinstance(thread.held, dict):
        thread.held[key] = value


def _begin() -> None:
    thread.state, thread.held = object(), {}


def wrap_generate(plain: Callable[..., Any]) -> Callable[..., Any]:
    """`generate` as one state of the model."""

    @functools.wraps(plain)
    def generate(*args: Any, **kwargs: Any) -> Any:
        with one_state():
            return plain(*args, **kwargs)

    return generate
