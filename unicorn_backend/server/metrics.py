"""Prometheus metrics of one server."""

from __future__ import annotations

import time
from collections import deque

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from unicorn_backend.generation.engine import Engine
from unicorn_backend.generation.meter import resident_bytes
from unicorn_backend.generation.request import Result

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
RATES = (1, 2, 5, 10, 20, 30, 50, 100, 200, 500, 1000, 2000)
RECENT_S = 60.0
BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32)


class Metrics:
    """Counters and histograms in a registry of their own, so that several servers fit into one process."""

    def __init__(self, engine: Engine) -> None:
        self.registry = registry = CollectorRegistry()
        self.engine = engine
        self.started = time.time()
        self._recent: deque[tuple[float, int, float]] = deque()  # (when, new tokens, calls) of the last minute
        self.requests = Counter(
            "unicorn_requests", "HTTP requests by path and status", ["path", "status"], registry=registry
        )
        self.failed = Counter("unicorn_failures", "Requests that failed inside the model", registry=registry)
        self.cancelled = Counter("unicorn_cancelled", "Requests whose client left", registry=registry)
        self.rejected = Counter("unicorn_rejected", "Requests turned away", ["reason"], registry=registry)
        self.prompt_tokens = Counter("unicorn_prompt_tokens", "Tokens of prompts", registry=registry)
        self.reused_tokens = Counter("unicorn_reused_tokens", "Tokens of prompts that were known", registry=registry)
        self.new_tokens = Counter("unicorn_generated_tokens", "Tokens generated", registry=registry)
        self.drafted = Counter("unicorn_drafted_tokens", "Tokens drafted by speculation", registry=registry)
        self.accepted = Counter("unicorn_accepted_tokens", "Drafted tokens that were right", registry=registry)
        self.waiting = Gauge("unicorn_queue_length", "Requests that wait", registry=registry)
        self.running = Gauge("unicorn_running", "Requests that run", registry=registry)
        self.batch_rows = Histogram(
            "unicorn_batch_size", "Requests that a call of the model gave a token", buckets=BATCHES, registry=registry
        )
        self.queue_seconds = self._seconds("unicorn_queue_seconds", "Time in the queue")
        self.first_token_seconds = self._seconds(
            "unicorn_first_token_seconds", "From the start of a request to a token"
        )
        self.request_seconds = self._seconds("unicorn_generation_seconds", "From the start of a request to its end")
        self.rate = Histogram(
            "unicorn_tokens_per_second", "Of one request, after its first token", buckets=RATES, registry=registry
        )
        gauges = {
            "unicorn_memory_bytes": ("Memory of the process", resident_bytes),
            "unicorn_prefix_bytes": ("Keys and values kept between requests", lambda: engine.prefixes.bytes),
            "unicorn_prefix_entries": ("Conversations kept between requests", lambda: len(engine.prefixes)),
            "unicorn_recent_tokens_per_second": ("Tokens generated in the last minute, per second", self.recent_rate),
        }
        for name, (text, value) in gauges.items():
            Gauge(name, text, registry=registry).set_function(value)

    def _seconds(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, buckets=SECONDS, registry=self.registry)

    def finished(self, result: Result) -> None:
        """Count one answer."""
        if result.finish == "cancelled":
            self.cancelled.inc()
        self.prompt_tokens.inc(result.prompt_tokens)
        self.reused_tokens.inc(result.reused_tokens)
        self.new_tokens.inc(len(result.ids))
        self.drafted.inc(result.drafted)
        self.accepted.inc(result.accepted)
        if result.ids:
            self.first_token_seconds.observe(result.first_token_s)
        self.request_seconds.observe(result.seconds)
        if len(result.ids) > 1:
            self.rate.observe(result.tokens_per_second)
        self._recent.append((time.monotonic(), len(result.ids), result.shared_calls))

    def recent_rate(self) -> float:
        """Tokens per second over the last minute."""
        return self._recent_rates()[0]

    def _recent_rates(self) -> tuple[float, float]:
        """Tokens and calls of the model per second over the last minute."""
        now = time.monotonic()
        while self._recent and self._recent[0][0] < now - RECENT_S:
            self._recent.popleft()
        recent = list(self._recent)  # other threads count
        return sum(tokens for _, tokens, _ in recent) / RECENT_S, sum(calls for *_, calls in recent) / RECENT_S

    def totals(self) -> dict[str, int]:
        """Tokens since the start."""
        names = ("generated_tokens", "prompt_tokens", "reused_tokens")
        return {name: int(self.registry.get_sample_value(f"unicorn_{name}_total") or 0) for name in names}

    def speed(self) -> str:
        """Of the last minute: tokens/s, GB/s and their share of the memory ceiling; and memory now."""
        return self.engine.meter.describe(*self._recent_rates(), 0)

    def text(self) -> bytes:
        return generate_latest(self.registry)
