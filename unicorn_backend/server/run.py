"""Start the server and run it until it is told to stop."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import uvicorn
from rich.console import Console
from rich.live import Live
from rich.text import Text

from unicorn_backend.errors import OptionError
from unicorn_backend.generation.batch import ROWS
from unicorn_backend.generation.engine import Engine
from unicorn_backend.integration.prepare import plans_of
from unicorn_backend.partition import calibration, cost
from unicorn_backend.server.app import Limits, Server

__all__ = ["Limits", "serve"]

CONNECTIONS = 2000
"""Open at a time; beyond, uvicorn itself answers 503."""


def serve(
    engine: Engine,
    host: str,
    port: int,
    limits: Limits,
    api_key: str = "",
    speculate: bool = False,
    name: str = "",
    monitor: bool = False,
) -> None:
    """Listen, compile, answer; returns after Ctrl-C or SIGTERM. Raises OptionError if the address is taken.

    monitor: a live line of the last minute's speed on stderr, where that is a terminal.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise OptionError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from error
        server = Server(engine, limits, api_key, speculate, name)
        print(f"compiling {server.name}", file=sys.stderr)
        seconds = engine.warm_up(speculate, limits.batch or ROWS)
        if not limits.batch:
            server.worker.batch, why = together(engine)
            print(why, file=sys.stderr)
        torch.ops.unicorn.release_threads()  # this thread's: the worker's answers took twice as long beside them
        listener.listen(CONNECTIONS)  # who reads "ready" and connects at once is not refused
        shown = f"[{host}]" if ":" in host else host
        base = f"http://{shown}:{listener.getsockname()[1]}"
        print(f"ready in {seconds:.1f} s: {base}/v1 (OpenAI API), {base}/ (statistics)", file=sys.stderr, flush=True)
        for line in engine.placements():
            print(line, file=sys.stderr)
        if host not in ("127.0.0.1", "::1", "localhost") and not api_key:
            print("warning: everybody who reaches this address may use it; set --api-key", file=sys.stderr)
        config = uvicorn.Config(
            server.app, log_level="warning", limit_concurrency=CONNECTIONS, timeout_keep_alive=30, backlog=CONNECTIONS
        )
        with live_line(server) if monitor else nullcontext():
            uvicorn.Server(config).run(sockets=[listener])


def together(engine: Engine) -> tuple[int, str]:
    """How many requests to decode together on this machine, and the reason in words. After `warm_up`."""
    plan = next((plan for plan in plans_of(engine.original) if plan.tokens == "1" and plan.steps), None)
    if plan is None:
        return ROWS, f"up to {ROWS} requests run together: no graph of one token to predict from"
    rates = calibration.rates()
    rows, gain = cost.rows_worth(plan, rates, ROWS)
    return rows, f"up to {rows} requests run together, {gain:.1f} times the tokens/s of one ({rates.source})"


@contextmanager
def live_line(server: Server, console: Console | None = None, every_s: float = 0.5) -> Iterator[None]:
    """Requests that run and wait, and the speed of the last minute, refreshed on one line."""
    stop = threading.Event()
    with Live(console=console or Console(stderr=True), auto_refresh=False) as live:

        def refresh() -> None:
            while not stop.wait(every_s):
                requests = ", ".join(f"{name} {value}" for name, value in server.worker.describe().items())
                live.update(Text(f"{requests} · last minute: {server.metrics.speed()}", style="dim"), refresh=True)

        thread = threading.Thread(target=refresh, name="unicorn-monitor", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
