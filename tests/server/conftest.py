"""A running server on a free port, as a client sees it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.engines import make_engine
from unicorn_backend.generation.engine import Engine

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")


@pytest.fixture(scope="package")
def engine(tiny_weights: dict[str, torch.Tensor]) -> Engine:
    engine = make_engine(tiny_weights)
    engine.warm_up(rows=2)
    return engine  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def clean_torch() -> None:
    """Here compiled graphs are kept from test to test."""
    torch.manual_seed(0)


@contextlib.contextmanager
def running(engine: Engine, **options: Any) -> Iterator[Any]:
    """A `Server` that listens at `server.url`."""
    from unicorn_backend.server.app import Server

    server = Server(engine, **options)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        runner = uvicorn.Server(uvicorn.Config(server.app, log_level="error", backlog=2000))
        thread = threading.Thread(target=runner.run, kwargs={"sockets": [listener]})
        thread.start()
        while not runner.started:
            time.sleep(0.01)
        server.address = listener.getsockname()
        server.url = f"http://127.0.0.1:{server.address[1]}"
        try:
            yield server
        finally:
            runner.should_exit = True
            thread.join()


@pytest.fixture(scope="package")
def server(engine: Engine) -> Iterator[Any]:
    with running(engine) as server:
        yield server


@pytest.fixture
def start(engine: Engine) -> Callable[..., Any]:
    """Start a server with other limits: `with start(limits=...) as server`."""
    return lambda **options: running(engine, **options)


def eventually(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    """Wait for something that other threads do."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return condition()
