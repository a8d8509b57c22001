"""Many clients at once, clients that leave or do not read: nothing is lost, and nothing stays behind."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from typing import Any

import openai
import pytest

from tests.server.conftest import eventually
from unicorn_backend.generation.meter import resident_bytes
from unicorn_backend.server.app import Limits

CLIENTS = 200
PROMPTS = ("The film is a", "The water", "In the year", "A new")


def client_of(server: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=300)


async def stream(client: openai.AsyncOpenAI, prompt: str, tokens: int = 8) -> tuple[str, str | None]:
    """Text and finish reason of a streamed completion."""
    parts, finish = [], None
    extra = {"ignore_eos": True}
    chunks = await client.completions.create(
        model="tiny", prompt=prompt, max_tokens=tokens, temperature=0, stream=True, extra_body=extra
    )
    async for chunk in chunks:
        parts.append(chunk.choices[0].text)
        finish = chunk.choices[0].finish_reason or finish
    return "".join(parts), finish


async def one(server: Any, prompt: str) -> tuple[str, str | None]:
    async with client_of(server) as client:
        return await stream(client, prompt)


def test_hundreds_of_clients_all_get_their_answer(start: Any) -> None:
    async def all_at_once(server: Any) -> list[tuple[str, str | None]]:
        async with client_of(server) as client:
            return await asyncio.gather(*(stream(client, PROMPTS[i % len(PROMPTS)]) for i in range(CLIENTS)))

    with start(limits=Limits(queue=CLIENTS, per_client=CLIENTS)) as server:
        first = asyncio.run(all_at_once(server))
        before = resident_bytes()
        answers = asyncio.run(all_at_once(server))
        grown = resident_bytes() - before
        assert server.worker.waiting == 0 and eventually(lambda: not server._clients)
        calls, tokens = (server.metrics.registry.get_sample_value(f"unicorn_batch_size_{n}") for n in ("count", "sum"))
        assert tokens > 3 * calls, "they ran together"
    assert first == answers and len(answers) == CLIENTS
    assert {finish for _, finish in answers} == {"length"}
    assert len(set(answers)) == len(PROMPTS), "every client of a prompt got the same text"
    assert grown < 30 << 20, f"memory grew by {grown >> 20} MB over {CLIENTS} requests"


def test_a_flood_is_turned_away_without_losing_what_was_accepted(start: Any) -> None:
    async def flood(server: Any) -> list[Any]:
        async with client_of(server) as client:
            work = (stream(client, PROMPTS[i % len(PROMPTS)], 16) for i in range(100))
            return await asyncio.gather(*work, return_exceptions=True)

    with start(limits=Limits(queue=5, per_client=1000)) as server:
        results = asyncio.run(flood(server))
        answered = [r for r in results if isinstance(r, tuple)]
        refused = [r for r in results if isinstance(r, openai.APIStatusError)]
        assert len(answered) + len(refused) == 100 and len(answered) >= 5 and refused
        assert {r.status_code for r in refused} == {503}
        assert all(r.response.headers["retry-after"] for r in refused)
        assert {finish for _, finish in answered} == {"length"}
    with start(limits=Limits(queue=1000, per_client=3)) as server:
        results = asyncio.run(flood(server))
        refused = [r for r in results if isinstance(r, openai.APIStatusError)]
        assert {r.status_code for r in refused} == {429} and 3 <= 100 - len(refused) < 100


def open_stream(server: Any, tokens: int) -> socket.socket:
    """A connection that has asked for a stream and reads nothing yet."""
    body = {"prompt": "The film", "max_tokens": tokens, "stream": True, "ignore_eos": True, "top_k": 50}
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    connection = socket.create_connection(server.address, timeout=60)
    connection.sendall(head.encode() + data)
    return connection


def test_who_leaves_is_no_longer_worked_for(start: Any) -> None:
    with start(limits=Limits(queue=4, batch=1)) as server:
        running = open_stream(server, 2000)
        assert running.recv(4096).startswith(b"HTTP/1.1 200")
        waiting = [open_stream(server, 2000) for _ in range(4)]
        assert eventually(lambda: server.worker.waiting == 4)
        for connection in waiting:  # never started: their places are free at once
            connection.close()
        assert eventually(lambda: server.worker.waiting == 0)
        running.close()
        assert eventually(lambda: not server.worker.running)
        assert eventually(lambda: server.metrics.cancelled._value.get() == 5)
        assert server.metrics.new_tokens._value.get() < 2000
        assert asyncio.run(one(server, "The film is a"))[1] == "length"
        assert not server._clients


def test_a_whole_answer_is_cancelled_too(start: Any) -> None:
    with start() as server:
        data = json.dumps({"prompt": "The film", "max_tokens": 2000, "ignore_eos": True}).encode()
        connection = socket.create_connection(server.address, timeout=60)
        connection.sendall(
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data
        )
        assert eventually(lambda: bool(server.worker.running))
        connection.close()
        assert eventually(lambda: not server.worker.running and not server._clients)
        assert server.metrics.new_tokens._value.get() < 2000


def test_slow_readers_hold_nobody_up(start: Any) -> None:
    with start() as server:
        slow = [open_stream(server, 500) for _ in range(3)]
        assert asyncio.run(one(server, "The film is a"))[1] == "length"
        for connection in slow:
            received = b""
            while not received.endswith(b"0\r\n\r\n"):
                part = connection.recv(65536)
                assert part, "the stream broke off"
                received += part
            assert received.count(b"data: ") > 100 and b"[DONE]" in received
            connection.close()


def sent(server: Any, data: bytes, leave: bool = False) -> bytes:
    """What the server answers to these bytes; `leave`: close without reading."""
    with socket.create_connection(server.address, timeout=60) as connection:
        connection.sendall(data)
        return b"" if leave else connection.recv(4096)


def test_nonsense_between_streams_harms_nobody(start: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Bodies that are cut, damaged, too deep, no text, or never come; each is refused or left, and costs nothing."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    bodies = (b'{"prompt": "a', b'{"prompt": "\xff"}', b"[" * 90_000, b'{"prompt": {}}', b'{"prompt":"a","top_p":NaN}')
    whole = [head % len(body) + body for body in bodies] + [os.urandom(500) + b"\r\n\r\n", head % -5]
    parts = [head[:30], head % 50 + b'{"prompt"', (head % 50)]

    async def mixed(server: Any) -> list[tuple[str, str | None]]:
        async with client_of(server) as client:
            streams = [asyncio.create_task(stream(client, PROMPTS[i % len(PROMPTS)])) for i in range(40)]
            for _ in range(4):
                answers = await asyncio.gather(*(asyncio.to_thread(sent, server, data) for data in whole))
                assert {answer[:12] for answer in answers} == {b"HTTP/1.1 400"}
                await asyncio.gather(*(asyncio.to_thread(sent, server, data, True) for data in parts))
                assert (await asyncio.to_thread(sent, server, head % 10**12)).startswith(b"HTTP/1.1 413")
            return await asyncio.gather(*streams)

    with start(limits=Limits(queue=100, per_client=100)) as server:
        answers = asyncio.run(mixed(server))
        assert (
            len(answers) == 40 and {finish for _, finish in answers} == {"length"} and len(set(answers)) == len(PROMPTS)
        )
        assert eventually(lambda: not server._clients and not server.worker.running)
        assert b'status="499"} 8.0' in server.metrics.text() and b'status="500"' not in server.metrics.text()
    assert not [record for record in caplog.records if record.exc_info]


def test_stopping_ends_what_runs(start: Any) -> None:
    with start() as server:
        connection = open_stream(server, 2000)
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        server.worker.stop()
        assert not server.worker.alive
        connection.close()
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.InternalServerError):
            client.completions.create(model="tiny", prompt="a")
