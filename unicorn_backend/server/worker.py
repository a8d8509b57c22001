"""One thread that runs the requests, several at a time, in the order in which they came, from a bounded queue."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from unicorn_backend.generation.batch import ROWS, Batch
from unicorn_backend.generation.engine import Engine
from unicorn_backend.generation.request import Result, Settings, TokenLogprob
from unicorn_backend.integration.model_state import one_state
from unicorn_backend.server.metrics import Metrics

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """Some text of an answer, with the log probabilities of its tokens if they were asked for."""

    text: str
    logprobs: Sequence[TokenLogprob]


Event = Piece | Result | Exception
"""What a job's consumer gets: pieces, and at last a result or an error."""


@dataclass(eq=False)
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
    """Owns the engine. `submit` never blocks; it raises `Full`. batch: requests that run together."""

    def __init__(self, engine: Engine, metrics: Metrics, capacity: int, batch: int = ROWS) -> None:
        self.engine, self.metrics, self.capacity, self.batch = engine, metrics, capacity, batch
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._waiting = 0  # jobs that nobody has cancelled yet
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="unicorn-worker", daemon=True)
        self.running: list[Job] = []
        self._stopping = False

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Cancel what runs and waits, and end the thread."""
        self._stopping = True
        with self._lock:
            for job in self.running:
                job.cancelled.set()
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
        batch = Batch(self.engine, self.batch, on_step=self.metrics.batch_rows.observe)
        while (job := self._jobs.get()) is not None:
            with one_state():  # until nothing runs, nobody changes the model
                self._start(batch, job)
                while batch:
                    self._fill(batch)
                    for ended, outcome in batch.step():
                        self._end(ended, outcome)

    def _fill(self, batch: Batch) -> None:
        """Start what waits, as far as there is room."""
        while batch.has_room:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return
            if job is None:  # for `_run`, once what runs has ended
                self._jobs.put(None)
                return
            self._start(batch, job)

    def _start(self, batch: Batch, job: Job) -> None:
        with self._lock:
            if not job.waiting:  # abandoned
                return
            job.waiting = False
            self._count(-1)
            if self._stopping:
                job.emit(RuntimeError("the server is stopping"))
                return
            self.running.append(job)
        self.metrics.running.set(len(self.running))
        self.metrics.queue_seconds.observe(time.perf_counter() - job.queued_at)

        def on_text(text: str, logprobs: Sequence[TokenLogprob]) -> None:
            job.emit(Piece(text, logprobs))

        batch.add(job, job.ids, job.settings, on_text if job.pieces else None, job.cancelled)

    def _end(self, job: Job, outcome: Result | Exception) -> None:
        with self._lock:
            self.running.remove(job)
        self.metrics.running.set(len(self.running))
        if isinstance(outcome, Exception):
            log.error("a request failed", exc_info=outcome)
            self.metrics.failed.inc()
        else:
            self.metrics.finished(outcome)
        job.emit(outcome)

    def describe(self) -> dict[str, Any]:
        return {
            "running": len(self.running),
            "batch": self.batch,
            "waiting": self._waiting,
            "capacity": self.capacity,
        }
