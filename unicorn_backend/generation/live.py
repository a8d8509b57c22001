"""An answer on the terminal while it is generated, with or without a live line of measurements below it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

Answer = TypeVar("Answer")


def stream_answer(
    console: Console,
    ask: Callable[..., Answer],
    status: Callable[[float, int], str],
    monitor: bool = False,
) -> Answer:
    """Call `ask(on_text=, cancelled=)` and print its text as it comes. Ctrl-C stops the answer, not the program.

    In the calling thread, which must be the main one: OpenMP has other threads for each that computes, and with those
    of a second one a small model took twice as long per token.
    status: what the live line says, from tokens per second and tokens so far.
    """
    show: _Plain | _Monitored = _Monitored(console, status) if monitor and console.is_terminal else _Plain(console)
    with show, _cancelled_by_interrupt() as cancelled:
        return ask(on_text=lambda piece, _: show.add(piece), cancelled=cancelled)


@contextmanager
def _cancelled_by_interrupt() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second one interrupts the program as usual."""
    cancelled = threading.Event()

    def cancel(*_: Any) -> None:
        cancelled.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, cancel)
    try:
        yield cancelled
    finally:
        signal.signal(signal.SIGINT, before)


class _Plain:
    def __init__(self, console: Console) -> None:
        self._console = console

    def __enter__(self) -> None:
        pass

    def add(self, piece: str) -> None:
        self._console.file.write(piece)  # console.out, which does the same here, takes 0.15 ms
        self._console.file.flush()

    def __exit__(self, *_: Any) -> None:
        self._console.out("")


class _Monitored:
    """The text with one line under it, refreshed four times a second by rich's own thread."""

    def __init__(self, console: Console, status: Callable[[float, int], str]) -> None:
        self._status, self._text, self._times = status, "", list[float]()
        self._done = False
        self._live = Live(
            console=console, refresh_per_second=4, vertical_overflow="visible", get_renderable=self._render
        )

    def __enter__(self) -> None:
        self._live.start()

    def add(self, piece: str) -> None:
        self._text += piece
        self._times.append(time.perf_counter())

    def _render(self) -> Text | Group:
        if self._done or not self._times:
            return Text(self._text)
        times = self._times[:]
        recent = [t for t in times if t > times[-1] - 1]
        rate = (len(recent) - 1) / (recent[-1] - recent[0]) if len(recent) > 1 else 0.0
        return Group(Text(self._text), Text(self._status(rate, len(times)), style="dim"))

    def __exit__(self, *_: Any) -> None:
        self._done = True
        self._live.stop()
