"""An answer on the terminal while it is generated, with or without a live line of measurements below it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
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

    status: what the live line says, from tokens per second and tokens so far.
    """
    cancelled = threading.Event()
    show: _Plain | _Monitored = _Monitored(console, status) if monitor and console.is_terminal else _Plain(console)
    with show, ThreadPoolExecutor(1, "unicorn-answer") as pool:
        answer = pool.submit(ask, on_text=lambda piece, _: show.add(piece), cancelled=cancelled)
        while not answer.done():
            try:
                wait([answer], timeout=0.1)
                show.tick()
            except KeyboardInterrupt:
                cancelled.set()
    return answer.result()


class _Plain:
    def __init__(self, console: Console) -> None:
        self._console = console

    def __enter__(self) -> None:
        pass

    def add(self, piece: str) -> None:
        self._console.out(piece, end="", highlight=False)
        self._console.file.flush()

    def tick(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        self._console.out("")


class _Monitored:
    """The text with one line under it, refreshed four times a second."""

    def __init__(self, console: Console, status: Callable[[float, int], str]) -> None:
        self._status, self._text, self._times = status, "", [time.perf_counter()]
        self._live = Live(console=console, refresh_per_second=4, vertical_overflow="visible")

    def __enter__(self) -> None:
        self._live.start()

    def add(self, piece: str) -> None:
        self._text += piece
        self._times.append(time.perf_counter())

    def tick(self) -> None:
        recent = [t for t in self._times if t > self._times[-1] - 1]
        rate = (len(recent) - 1) / (recent[-1] - recent[0]) if len(recent) > 1 else 0.0
        self._live.update(Group(Text(self._text), Text(self._status(rate, len(self._times)), style="dim")))

    def __exit__(self, *_: Any) -> None:
        self._live.update(Text(self._text))
        self._live.stop()
