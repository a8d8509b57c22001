"""Start the server and run it until it is told to stop."""

from __future__ import annotations

import socket
import sys

import uvicorn

from unicorn_backend.errors import OptionError
from unicorn_backend.generation.engine import Engine
from unicorn_backend.server.app import Limits, Server

__all__ = ["Limits", "serve"]

CONNECTIONS = 2000
"""Open at a time; beyond, uvicorn itself answers 503."""


def serve(
    engine: Engine, host: str, port: int, limits: Limits, api_key: str = "", speculate: bool = False, name: str = ""
) -> None:
    """Listen, compile, answer; returns after Ctrl-C or SIGTERM. Raises OptionError if the address is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise OptionError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from error
        server = Server(engine, limits, api_key, speculate, name)
        print(f"compiling {server.name}", file=sys.stderr)
        seconds = engine.warm_up(speculate)
        shown = f"[{host}]" if ":" in host else host
        base = f"http://{shown}:{listener.getsockname()[1]}"
        print(f"ready in {seconds:.1f} s: {base}/v1 (OpenAI API), {base}/ (statistics)", file=sys.stderr, flush=True)
        if host not in ("127.0.0.1", "::1", "localhost") and not api_key:
            print("warning: everybody who reaches this address may use it; set --api-key", file=sys.stderr)
        config = uvicorn.Config(
            server.app, log_level="warning", limit_concurrency=CONNECTIONS, timeout_keep_alive=30, backlog=CONNECTIONS
        )
        uvicorn.Server(config).run(sockets=[listener])
