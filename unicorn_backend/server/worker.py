"""One thread that runs the requests, in the order in which they came, from a queue of bounded length."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from unicorn_backend.generation.engine import Engine, Result, Settings, TokenLogprob
from unicorn_backend.server.metrics import Metrics

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """Some text of an answer, with the log probabilities of its tokens if they were asked for."""

    text: str
    logprobs: Sequence[TokenLogprob]


Event = Piece | Result | Exception
"""What a job's consumer gets: pieces, and at last a result or an error."""


@dataclass
class Job:
    """One request on its way. The worker puts events, the HTTP handler takes them; `cancelled` goes the other way."""

    ids: list[int]
    settings: Settings
    loop: asyncio.AbstractEventLoop
    pieces: bool = True  # False: only the result is wanted
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    cancelled: threading.Event = field(default_factory=threading.Event)
    queued_at: float = field(default_factory=time.perf_counter)
    waiting: bool = False  # in the queue, and counted

    def leave(self) -> None:
        """The client is gone: stop before the next token, or before the start."""
        self.cancelled.set()
        self.events.put_nowait(ConnectionAbortedError("the client left"))

    def emit(self, event: Event) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)


class Full(Exception):
    """The queue has no place."""


class Worker:
    """Owns the engine. `submit` never blocks; it raises `Full`."""

    def __init__(self, engine: Engine, metrics: Metrics, capacity: int) -> None:
        self.engine, self.metrics, self.capacity = engine, metrics, capacity
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._waiting = 0  # jobs that nobody has cancelled yet
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="unicorn-worker", daemon=True)
        self.running: Job | None = None
        self._stopping = False

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Cancel what runs and waits, and end the thread."""
        self._stopping = True
        if self.running is not None:
            self.running.cancelled.set()
        self._jobs.put(None)
        self._thread.join(timeout=30)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        return self._waiting

    def submit(self, job: Job) -> None:
        with self._lock:
            if self._waiting >= self.capacity or self._stopping:
                raise Full
            job.waiting = True
            self._count(1)
        self._jobs.put(job)

    def abandon(self, job: Job) -> None:
        """The request is over for its client, finished or not: a place in the queue is free again at once."""
        job.cancelled.set()
        with self._lock:
            if job.waiting:
                job.waiting = False
                self._count(-1)
                self.metrics.cancelled.inc()

    def _count(self, change: int) -> None:
        self._waiting += change
        self.metrics.waiting.set(self._waiting)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            with self._lock:
                if not job.waiting:  # abandoned
                    continue
                job.waiting = False
                self._count(-1)
                self.running = job
            if self._stopping:
                job.emit(RuntimeError("the server is stopping"))
                continue
            self.metrics.running.set(1)
            self.metrics.queue_seconds.observe(time.perf_counter() - job.queued_at)
            self._serve(job)
            self.running = None
            self.metrics.running.set(0)

    def _serve(self, job: Job) -> None:
        def on_text(text: str, logprobs: Sequence[TokenLogprob]) -> None:
            job.emit(Piece(text, logprobs))

        try:
            result = self.engine.generate(job.ids, job.settings, on_text if job.pieces else None, job.cancelled)
        except Exception as error:  # one request's failure must not end the server; it is logged, counted and reported
            log.exception("a request failed")
            self.metrics.failed.inc()
            job.emit(error)
            return
        self.metrics.finished(result)
        job.emit(result)

    def describe(self) -> dict[str, Any]:
        return {"running": self.running is not None, "waiting": self._waiting, "capacity": self.capacity}
