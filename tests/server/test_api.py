"""The OpenAI API through its official client, and what it says to requests it cannot answer."""

from __future__ import annotations

import http.client
import io
import json
import time
from typing import Any

import openai
import pytest
from rich.console import Console

from unicorn_backend.generation.request import Result, Settings, TokenLogprob
from unicorn_backend.server.run import live_line
from unicorn_backend.server.tools import parse_tools

ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Tell me of the film"}]}
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}


@pytest.fixture
def client(server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=120)


def post(server: Any, path: str, body: Any, **headers: str) -> tuple[int, Any]:
    """Status and decoded body of a raw request."""
    connection = http.client.HTTPConnection(*server.address, timeout=120)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, data, {"Content-Type": "application/json", **headers})
    response = connection.getresponse()
    text = response.read()
    connection.close()
    return response.status, json.loads(text)


def get(server: Any, path: str, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(*server.address, timeout=120)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "unicorn"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'"):
        client.models.retrieve("gpt-4")


def test_chat_streamed_and_whole_are_the_same(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**ASK, **GREEDY)
    assert whole.choices[0].finish_reason == "length" and whole.usage is not None
    assert (whole.usage.completion_tokens, whole.usage.total_tokens) == (12, whole.usage.prompt_tokens + 12)
    chunks = list(client.chat.completions.create(**ASK, **GREEDY, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content and len(chunks) > 8
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "length"
    assert len({chunk.id for chunk in chunks}) == 1
    usage = chunks[-1].usage
    assert usage is not None and usage.completion_tokens == 12
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1, "the whole prompt was known"


def test_seeds(client: openai.OpenAI) -> None:
    ask = {**ASK, "temperature": 1.0, "max_tokens": 16}
    first, again, other = (client.chat.completions.create(**ask, seed=s).choices[0].message.content for s in (1, 1, 2))
    assert first == again != other


def test_stop(client: openai.OpenAI) -> None:
    text = client.completions.create(model="tiny", prompt="The film is a", **GREEDY).choices[0].text
    stop = text[8:12]
    cut = client.completions.create(model="tiny", prompt="The film is a", stop=[stop, "\x00"], **GREEDY).choices[0]
    assert cut.text == text[: text.index(stop)] and cut.finish_reason == "stop"


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**ASK, **GREEDY, logprobs=True, top_logprobs=3).choices[0]
    assert answer.logprobs is not None and answer.logprobs.content is not None
    assert len(answer.logprobs.content) == 12
    for item in answer.logprobs.content:
        assert len(item.top_logprobs) == 3 and item.logprob == item.top_logprobs[0].logprob <= 0, "greedy"
    assert "".join(item.token for item in answer.logprobs.content) == answer.message.content
    chunks = list(client.chat.completions.create(**ASK, **GREEDY, logprobs=True, stream=True))
    parts = [c.choices[0].logprobs.content for c in chunks if c.choices[0].logprobs]
    assert sum(len(part or []) for part in parts) == 12
    plain = client.completions.create(model="tiny", prompt="The film", **GREEDY, logprobs=2).choices[0]
    assert plain.logprobs is not None and plain.logprobs.token_logprobs is not None
    assert len(plain.logprobs.token_logprobs) == 12 and plain.logprobs.text_offset[:1] == [0]


def test_completions_of_text_and_of_ids(client: openai.OpenAI, engine: Any) -> None:
    prompt = "The film is a"
    whole = client.completions.create(model="tiny", prompt=prompt, **GREEDY)
    by_ids = client.completions.create(model="tiny", prompt=engine.encode(prompt), **GREEDY)
    streamed = client.completions.create(model="tiny", prompt=[prompt], stream=True, **GREEDY)
    assert whole.choices[0].text == by_ids.choices[0].text == "".join(c.choices[0].text for c in streamed)
    direct = engine.generate(engine.encode(prompt), Settings(12, ignore_eos=True))
    assert whole.choices[0].text == direct.text


def test_a_conversation_reuses_its_turns(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "system", "content": "Be brief " * 40}, {"role": "user", "content": "The water?"}]
    first = client.chat.completions.create(model="tiny", messages=messages, **GREEDY)
    assert first.usage is not None
    messages += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "And?"},
    ]
    second = client.chat.completions.create(model="tiny", messages=messages, **GREEDY)
    assert second.usage is not None and second.usage.prompt_tokens_details is not None
    assert (second.usage.prompt_tokens_details.cached_tokens or 0) >= first.usage.prompt_tokens


def test_speculation_says_the_same(client: openai.OpenAI) -> None:
    ask = {"model": "tiny", "prompt": "a b c d e f a b c d e f a b", "temperature": 0, "max_tokens": 60}
    plain = client.completions.create(**ask, extra_body={"ignore_eos": True})
    fast = client.completions.create(**ask, extra_body={"ignore_eos": True, "speculate": True})
    assert plain.choices[0].text == fast.choices[0].text


def test_content_in_parts_and_roles(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "Tell me "}, {"type": "text", "text": "of the film"}]
    one = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": parts}], **GREEDY)
    two = client.chat.completions.create(**ASK, **GREEDY)
    assert one.choices[0].message.content == two.choices[0].message.content


LONG = {**ASK, "messages": [{"role": "user", "content": "film " * 3000}]}
BAD: list[tuple[str, Any, int, str]] = [
    ("/v1/chat/completions", b"", 400, "Invalid JSON"),
    ("/v1/chat/completions", b"{", 400, "Invalid JSON"),
    ("/v1/chat/completions", b"\xff\xfe", 400, "Invalid JSON"),
    ("/v1/chat/completions", b"[" * 100_000, 400, "Invalid JSON"),
    ("/v1/chat/completions", b'"text"', 400, ""),
    ("/v1/chat/completions", {}, 400, "messages"),
    ("/v1/chat/completions", {"messages": []}, 400, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "user"}, {"role": "wizard", "content": ""}]}, 400, "role"),
    ("/v1/chat/completions", {**ASK, "temperature": 9}, 400, "temperature"),
    ("/v1/chat/completions", {**ASK, "max_tokens": 0}, 400, "max_tokens"),
    ("/v1/chat/completions", {**ASK, "n": 2}, 400, "n:"),
    ("/v1/chat/completions", {**ASK, "stop": ["a"] * 99}, 400, "stop"),
    ("/v1/chat/completions", {**ASK, "top_logprobs": 2}, 400, "logprobs"),
    ("/v1/chat/completions", {**ASK, "frequency_penalty": 1.0}, 400, "frequency_penalty"),
    ("/v1/chat/completions", {**ASK, "response_format": {"type": "json_object"}}, 400, "response_format"),
    ("/v1/chat/completions", {**ASK, "wings": 2}, 400, "wings"),
    ("/v1/chat/completions", {**ASK, "model": "gpt-4"}, 404, "no model 'gpt-4'"),
    ("/v1/chat/completions", LONG, 400, "context of 2048"),
    ("/v1/chat/completions", {**ASK, "tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "no tools"),
    ("/v1/completions", {"prompt": []}, 400, "empty"),
    ("/v1/completions", {"prompt": ["a", "b"]}, 400, "prompt"),
    ("/v1/completions", {"prompt": [10**9]}, 400, "token ids"),
    ("/v1/completions", {"prompt": "a", "seed": 2**70}, 400, "seed"),
    ("/v1/nothing", {}, 404, "Not Found"),
    ("/v1/models", {}, 405, "Method Not Allowed"),
]


@pytest.mark.parametrize(("path", "body", "status", "text"), BAD)
def test_bad_requests(server: Any, path: str, body: Any, status: int, text: str) -> None:
    got, answer = post(server, path, body)
    assert got == status and text in answer["error"]["message"], answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_oversized_bodies(server: Any) -> None:
    status, answer = post(server, "/v1/chat/completions", b"x" * (1 << 20) + b"yy")
    assert status == 413 and answer["error"]["code"] == "body_too_large"
    connection = http.client.HTTPConnection(*server.address, timeout=60)  # without a length beforehand
    chunks = (b"y" * 65536 for _ in range(20))
    connection.request("POST", "/v1/completions", chunks, {"Content-Type": "application/json"}, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_api_key(start: Any) -> None:
    with start(api_key="secret") as server:
        assert post(server, "/v1/chat/completions", ASK)[0] == 401
        assert get(server, "/v1/models")[0] == 401 and get(server, "/metrics")[0] == 401
        assert get(server, "/v1/models", Authorization="Bearer wrong")[0] == 401
        assert get(server, "/v1/models", Authorization="Bearer secret")[0] == 200
        assert get(server, "/health")[0] == 200
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="secret", max_retries=0)
        assert client.chat.completions.create(**ASK, max_tokens=2).choices


def test_health_metrics_and_page(server: Any, client: openai.OpenAI) -> None:
    client.chat.completions.create(**ASK, **GREEDY)
    assert json.loads(get(server, "/health")[1])["status"] == "ok"
    status, text = get(server, "/metrics")
    assert status == 200
    for name in (
        "unicorn_generated_tokens_total",
        "unicorn_first_token_seconds_bucket",
        "unicorn_tokens_per_second_bucket",
        "unicorn_queue_length",
        "unicorn_batch_size_bucket",
        "unicorn_memory_bytes",
        'unicorn_requests_total{path="/v1/chat/completions",status="200"}',
    ):
        assert name in text
    stats = json.loads(get(server, "/stats")[1])
    assert stats["model"] == "tiny" and stats["generated_tokens"] >= stats["recent_tokens_per_second"] > 0
    assert stats["prompt_tokens"] > 0 and "GB/s" in stats["speed"] and stats["placements"] == []
    screen = Console(file=io.StringIO(), force_terminal=True, width=200)
    with live_line(server, screen, every_s=0.01):
        time.sleep(0.3)
    assert "running 0, batch 8, waiting 0" in screen.file.getvalue() and "tok/s" in screen.file.getvalue()
    assert "<title>unicorn</title>" in get(server, "/")[1]


def test_a_failure_inside_is_one_requests_own(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("out of unicorns")

    with monkeypatch.context() as patch:
        patch.setattr(server.engine, "generation_config", broken)
        assert post(server, "/v1/chat/completions", ASK)[0] == 500
        assert post(server, "/v1/chat/completions", {**ASK, "stream": True})[0] == 500
    assert post(server, "/v1/chat/completions", {**ASK, "max_tokens": 2})[0] == 200


def test_tools_reach_the_template(server: Any, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    names = "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}"
    template = names + "{% for m in messages %}{{ m.content }}{% endfor %}"
    monkeypatch.setattr(server.engine.tokenizer, "chat_template", template)
    tools: Any = [{"type": "function", "function": {"name": "weather " * 30, "parameters": {}}}]
    without = client.chat.completions.create(**ASK, **GREEDY).usage
    answer = client.chat.completions.create(**ASK, **GREEDY, tools=tools)
    assert answer.usage and without and answer.usage.prompt_tokens > without.prompt_tokens + 29
    assert answer.choices[0].message.content and not answer.choices[0].message.tool_calls
    chunks = list(client.chat.completions.create(**ASK, **GREEDY, tools=tools, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == answer.choices[0].message.content


def test_calls_are_parsed_as_the_model_declares_them(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    template = {
        "defaults": {"role": "assistant"},
        "start_anchor": "<start_of_turn>model\n",
        "fields": {
            "tool_calls": {
                "open_pattern": r"\s*<tool_call>",
                "close": "</tool_call>",
                "repeats": True,
                "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {"close": "<end_of_turn>", "content": "text"},
        },
    }
    monkeypatch.setattr(engine.tokenizer, "response_template", template, raising=False)
    said = 'Let me see.<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
    ids = engine.encode_rendered(said)
    result = Result(ids, said, "stop", 1, 0, "", 0.1, 0.2, 1, 0, 0, 0, logprobs=list[TokenLogprob]())
    text, calls = parse_tools(engine, engine.encode("<start_of_turn>model\n"), result, [{"type": "function"}])
    assert text == "Let me see." and len(calls) == 1
    assert calls[0]["function"]["name"] == "weather"
    assert json.loads(calls[0]["function"]["arguments"]) == {"city": "Oslo"}
