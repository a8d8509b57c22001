"""Spans of time in which nothing outside the compiled graphs changes the model: see `guards_once.py`."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

_thread = threading.local()


def current() -> object | None:
    """What stands for the state that the model is in, or None where anybody may change it at any time."""
    state: object | None = getattr(_thread, "state", None)
    return state


@contextlib.contextmanager
def one_state() -> Iterator[None]:
    """Within this block only compiled graphs change the model (as far as this thread is concerned)."""
    before = current()
    _thread.state = object()
    try:
        yield
    finally:
        _thread.state = before


def changed() -> None:
    """A compiled graph is about to change the model."""
    if current() is not None:
        _thread.state = object()


def wrap_generate(plain: Callable[..., Any]) -> Callable[..., Any]:
    """`generate` as one state of the model."""

    @functools.wraps(plain)
    def generate(*args: Any, **kwargs: Any) -> Any:
        with one_state():
            return plain(*args, **kwargs)

    return generate
