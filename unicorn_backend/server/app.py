"""The HTTP side: routes, limits, streaming, and what happens when a client leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from unicorn_backend.errors import OptionError, RequestError
from unicorn_backend.generation.batch import ROWS
from unicorn_backend.generation.engine import Engine
from unicorn_backend.generation.request import Result
from unicorn_backend.server import protocol
from unicorn_backend.server.metrics import Metrics
from unicorn_backend.server.protocol import ChatRequest, Common, CompletionRequest
from unicorn_backend.server.tools import parse_tools, template_knows_tools
from unicorn_backend.server.worker import Event, Full, Job, Piece, Worker

PAGE = Path(__file__).parent / "stats.html"
RETRY_S = 2
FAILED = "the request failed inside the server; its log says why"

Body = TypeVar("Body", bound=Common)


@dataclass(frozen=True)
class Limits:
    """max_tokens: of an answer whose request names none. per_client: requests at a time from one key or address.

    batch: requests that run together; 1 runs one after another, 0 (in `server.serve`) what pays on this machine.
    """

    queue: int = 64
    batch: int = ROWS
    per_client: int = 16
    body_bytes: int = 1 << 20
    max_tokens: int = 1024


class Refused(Exception):
    """An answer with an error body."""

    def __init__(self, status: int, message: str, kind: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.body = status, protocol.error(message, kind, code, param)


class Server:
    """Routes around one engine. `app` is the ASGI application."""

    def __init__(
        self, engine: Engine, limits: Limits | None = None, api_key: str = "", speculate: bool = False, name: str = ""
    ) -> None:
        self.engine, self.limits, self.speculate = engine, limits or Limits(), speculate
        self.name = name or Path(engine.name).name
        self.metrics = Metrics(engine)
        self.worker = Worker(engine, self.metrics, self.limits.queue, self.limits.batch or ROWS)
        self._key = api_key
        self._clients: Counter[str] = Counter()
        self._tokenizing = asyncio.Lock()
        self.app: Any = _Counted(self._build(), self.metrics)

    def _build(self) -> FastAPI:
        @contextlib.asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            self.worker.start()
            yield
            await asyncio.to_thread(self.worker.stop)

        app = FastAPI(
            title="unicorn",
            version=version("unicorn-backend"),
            lifespan=lifespan,
            openapi_url=None,
            docs_url=None,
            redoc_url=None,
        )
        app.add_exception_handler(Refused, _answer_refused)
        app.add_exception_handler(HTTPException, _answer_http)
        app.add_api_route("/", self._page, methods=["GET"])
        app.add_api_route("/stats", self._stats, methods=["GET"])
        app.add_api_route("/health", self._health, methods=["GET"])
        app.add_api_route("/metrics", self._metrics, methods=["GET"])
        app.add_api_route("/v1/models", self._models, methods=["GET"])
        app.add_api_route("/v1/models/{name:path}", self._model, methods=["GET"])
        app.add_api_route("/v1/chat/completions", self._chat, methods=["POST"])
        app.add_api_route("/v1/completions", self._complete, methods=["POST"])
        return app

    # ---- about the server ---------------------------------------------------------------------------------------

    async def _page(self) -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    async def _stats(self, request: Request) -> dict[str, Any]:
        self._authorize(request)
        return {
            "model": self.name,
            "context": self.engine.context,
            **self.worker.describe(),
            "recent_tokens_per_second": self.metrics.recent_rate(),
            **self.metrics.totals(),
            "speed": self.metrics.speed(),
            "prefixes": self.engine.prefixes.describe(),
            "placements": self.engine.placements(),
        }

    async def _health(self) -> JSONResponse:
        if not self.worker.alive:
            return JSONResponse({"status": "dead"}, 503)
        return JSONResponse({"status": "ok", **self.worker.describe()})

    async def _metrics(self, request: Request) -> Response:
        self._authorize(request)
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _models(self, request: Request) -> dict[str, Any]:
        self._authorize(request)
        return {"object": "list", "data": [self._about()]}

    async def _model(self, request: Request, name: str) -> dict[str, Any]:
        self._authorize(request)
        self._check_model(name)
        return self._about()

    def _about(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "model",
            "created": int(self.metrics.started),
            "owned_by": "unicorn",
            "context_length": self.engine.context,
        }

    # ---- completions --------------------------------------------------------------------------------------------

    async def _chat(self, request: Request) -> Response:
        body = await self._read(request, ChatRequest)
        if body.tools and not template_knows_tools(self.engine):
            raise Refused(
                400, f"the chat template of {self.name} knows no tools", "invalid_request_error", param="tools"
            )
        tools = body.tools if body.tool_choice != "none" else None

        def prepare() -> list[int]:
            messages = [message.plain() for message in body.messages]
            return self.engine.encode_rendered(self.engine.render(messages, tools, **body.chat_template_kwargs))

        return await self._answer(request, body, prepare, _ChatShape(self, body, tools))

    async def _complete(self, request: Request) -> Response:
        body = await self._read(request, CompletionRequest)
        prompt = body.one_prompt()
        prepare = (lambda: self.engine.encode(prompt)) if isinstance(prompt, str) else (lambda: prompt)
        return await self._answer(request, body, prepare, _TextShape(self, body))

    async def _read(self, request: Request, kind: type[Body]) -> Body:
        """The checked body of a request."""
        self._authorize(request)
        limit = self.limits.body_bytes
        data = bytearray()
        too_large = Refused(413, f"the body is larger than {limit} bytes", "invalid_request_error", "body_too_large")
        if int(request.headers.get("content-length") or 0) > limit:
            raise too_large
        try:
            async for chunk in request.stream():
                data += chunk
                if len(data) > limit:
                    raise too_large
        except ClientDisconnect:
            raise Refused(499, "the client left", "client_error") from None
        try:
            body = kind.model_validate_json(bytes(data))
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            message = f"{where}: {first['msg']}" if where else str(first["msg"])
            raise Refused(400, message, "invalid_request_error", param=where or None) from None
        self._check_model(body.model)
        return body

    def _authorize(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if self._key and not secrets.compare_digest(given.encode(), self._key.encode()):
            raise Refused(401, "the API key is missing or wrong", "authentication_error", "invalid_api_key")

    def _check_model(self, name: str) -> None:
        if name and name not in (self.name, self.engine.name):
            message = f"this server has no model {name!r}; it has {self.name!r}"
            raise Refused(404, message, "invalid_request_error", "model_not_found", "model")

    async def _answer(
        self, request: Request, body: Common, prepare: Callable[[], list[int]], shape: _Shape
    ) -> Response:
        """Queue the request and answer it, streaming or at once. Gives its place back in every case."""
        client = request.headers.get("authorization") or (request.client.host if request.client else "")
        if self._clients[client] >= self.limits.per_client:
            self.metrics.rejected.labels("per_client").inc()
            message = f"more than {self.limits.per_client} requests at a time from one client"
            raise Refused(429, message, "rate_limit_error", "rate_limit_exceeded")
        self._clients[client] += 1
        job: Job | None = None

        def leave() -> None:
            self._clients[client] -= 1
            if not self._clients[client]:
                del self._clients[client]
            if job is not None:
                self.worker.abandon(job)

        with contextlib.ExitStack() as undo:
            undo.callback(leave)
            job = await self._submit(body, prepare)
            watch = asyncio.create_task(_cancel_when_gone(request, job))
            undo.callback(watch.cancel)
            if body.stream:
                first = await job.events.get()  # an error before the first token is still a status code
                _raise_failure(first)
                return _EventStream(_stream(job, first, shape), undo.pop_all())
            result = await _result(job)
            return JSONResponse(shape.whole(result, job))

    async def _submit(self, body: Common, prepare: Callable[[], list[int]]) -> Job:
        try:
            settings = body.settings(self.limits.max_tokens, self.speculate)
            async with self._tokenizing:
                ids = await asyncio.to_thread(prepare)
            self.engine.check(ids)
            if isinstance(body, ChatRequest):
                settings = self.engine.for_chat(settings)
        except (RequestError, OptionError) as error:
            code = getattr(error, "code", None)
            raise Refused(400, str(error), "invalid_request_error", code) from None
        job = Job(ids, settings, asyncio.get_running_loop(), body.stream)
        try:
            self.worker.submit(job)
        except Full:
            self.metrics.rejected.labels("queue").inc()
            message = f"{self.limits.queue} requests wait already; try again"
            raise Refused(503, message, "server_error", "queue_full") from None
        return job


class _Shape:
    """How one request's pieces and result look on the wire."""

    kind = ""
    prefix = ""

    def __init__(self, server: Server, body: Common) -> None:
        self.server, self.body, self.engine = server, body, server.engine
        self.identity = protocol.new_id(self.prefix)
        self.said = 0  # characters

    def envelope(self, choices: list[dict[str, Any]], kind: str = "") -> dict[str, Any]:
        return protocol.envelope(kind or self.kind, self.server.name, self.identity, choices)

    def whole(self, result: Result, job: Job) -> dict[str, Any]:
        raise NotImplementedError

    def opening(self) -> list[dict[str, Any]]:
        return []

    def piece(self, piece: Piece) -> list[dict[str, Any]]:
        raise NotImplementedError

    def closing(self, result: Result, job: Job) -> list[dict[str, Any]]:
        raise NotImplementedError


class _ChatShape(_Shape):
    kind, prefix = "chat.completion", "chatcmpl"

    def __init__(self, server: Server, body: ChatRequest, tools: Any) -> None:
        super().__init__(server, body)
        self.tools = tools

    def _logprobs(self, items: Any) -> dict[str, Any] | None:
        return protocol.chat_logprobs(self.engine, items) if self.body.wanted_logprobs() is not None else None

    def whole(self, result: Result, job: Job) -> dict[str, Any]:
        text, calls = parse_tools(self.engine, job.ids, result, self.tools)
        message = {"role": "assistant", "content": text, **({"tool_calls": calls} if calls else {})}
        finish = "tool_calls" if calls else protocol.finish_of(result)
        choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": self._logprobs(result.logprobs)}
        return {**self.envelope([choice]), "usage": protocol.usage_of(result)}

    def _chunk(self, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
        return self.envelope([choice], "chat.completion.chunk")

    def opening(self) -> list[dict[str, Any]]:
        return [self._chunk({"role": "assistant", "content": ""})]

    def piece(self, piece: Piece) -> list[dict[str, Any]]:
        if self.tools:  # whether it is a call shows at the end only
            return []
        return [self._chunk({"content": piece.text}, logprobs=self._logprobs(piece.logprobs))]

    def closing(self, result: Result, job: Job) -> list[dict[str, Any]]:
        if not self.tools:
            return [self._chunk({}, protocol.finish_of(result))]
        text, calls = parse_tools(self.engine, job.ids, result, self.tools)
        delta: dict[str, Any] = {"content": text} if text else {}
        if calls:
            delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(calls)]
        finish = "tool_calls" if calls else protocol.finish_of(result)
        return [self._chunk(delta, logprobs=self._logprobs(result.logprobs)), self._chunk({}, finish)]


class _TextShape(_Shape):
    kind, prefix = "text_completion", "cmpl"

    def _choice(self, text: str, items: Any, finish: str | None, offset: int = 0) -> dict[str, Any]:
        wanted = self.body.wanted_logprobs() is not None
        logprobs = protocol.text_logprobs(self.engine, items, offset) if wanted else None
        return self.envelope([{"index": 0, "text": text, "finish_reason": finish, "logprobs": logprobs}])

    def whole(self, result: Result, job: Job) -> dict[str, Any]:
        return {
            **self._choice(result.text, result.logprobs, protocol.finish_of(result)),
            "usage": protocol.usage_of(result),
        }

    def piece(self, piece: Piece) -> list[dict[str, Any]]:
        offset, self.said = self.said, self.said + len(piece.text)
        return [self._choice(piece.text, piece.logprobs, None, offset)]

    def closing(self, result: Result, job: Job) -> list[dict[str, Any]]:
        return [self._choice("", [], protocol.finish_of(result), self.said)]


async def _cancel_when_gone(request: Request, job: Job) -> None:
    """Wait for the client to leave, and tell the worker. The body has been read: nothing else can come."""
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            job.leave()
            return


async def _result(job: Job) -> Result:
    while True:
        event = await job.events.get()
        _raise_failure(event)
        if isinstance(event, Result):
            return event


def _raise_failure(event: Event) -> None:
    if isinstance(event, ConnectionAbortedError):
        raise Refused(499, str(event), "client_error")
    if isinstance(event, Exception):
        raise Refused(500, FAILED, "server_error") from event


async def _stream(job: Job, first: Event, shape: _Shape) -> AsyncIterator[str]:
    """Server-sent events up to [DONE]."""
    options = shape.body.stream_options
    for chunk in shape.opening():
        yield _event(chunk)
    event = first
    while isinstance(event, Piece):
        for chunk in shape.piece(event):
            yield _event(chunk)
        event = await job.events.get()
    if isinstance(event, Exception):
        yield _event(protocol.error(FAILED, "server_error"))
        return
    for chunk in shape.closing(event, job):
        yield _event(chunk)
    if options is not None and options.include_usage:
        kind = "chat.completion.chunk" if shape.kind == "chat.completion" else shape.kind
        yield _event({**shape.envelope([], kind), "usage": protocol.usage_of(event)})
    yield "data: [DONE]\n\n"


class _EventStream(StreamingResponse):
    """Gives the request's place back however it ends, even if nothing of it was ever sent."""

    def __init__(self, events: AsyncIterator[str], release: contextlib.ExitStack) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._release = release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._release:
            await super().__call__(scope, receive, send)


class _Counted:
    """Counts responses by route and status, around the application."""

    def __init__(self, app: FastAPI, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = getattr(scope.get("route"), "path", "other")
                self._metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        await self._app(scope, receive, counting)


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def _answer_refused(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refused)
    headers = {"Retry-After": str(RETRY_S)} if error.status in (429, 503) else None
    return JSONResponse(error.body, error.status, headers)


async def _answer_http(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return JSONResponse(protocol.error(str(error.detail), "invalid_request_error"), error.status_code)
