"""Requests: lengths, ends, stop strings, sampling, log probabilities, cancelling."""

from __future__ import annotations

import dataclasses
import io
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from rich.console import Console

from unicorn_backend import models
from unicorn_backend.errors import OptionError, RequestError
from unicorn_backend.generation.answer import Answer
from unicorn_backend.generation.conversation import Conversation
from unicorn_backend.generation.engine import Engine
from unicorn_backend.generation.live import stream_answer
from unicorn_backend.generation.prefix import new_cache
from unicorn_backend.generation.request import Result, Settings
from unicorn_backend.generation.text import TextStream

PROMPT = "The film is a"


def test_text_is_what_transformers_generates(engine: Engine) -> None:
    ids = engine.encode(PROMPT)
    with torch.no_grad():
        want = engine.model.generate(
            torch.tensor([ids]), past_key_values=new_cache(engine.model), max_new_tokens=24, eos_token_id=None
        )
    got = engine.generate(ids, Settings(24, ignore_eos=True))
    assert got.ids == want[0, len(ids) :].tolist() and got.finish == "length"
    assert engine.tokenizer.decode(ids + got.ids, skip_special_tokens=True) == PROMPT + got.text


def test_pieces_add_up_and_are_more_than_one(engine: Engine) -> None:
    pieces: list[str] = []
    result = engine.generate(engine.encode(PROMPT), Settings(20), lambda text, _: pieces.append(text))
    assert "".join(pieces) == result.text and len(pieces) > 5


def test_seeds_and_their_independence(engine: Engine) -> None:
    ids = engine.encode("The film")
    first = engine.generate(ids, Settings(16, temperature=1.0, seed=3)).ids
    torch.rand(5)  # the process-wide generator is not involved
    again = engine.generate(ids, Settings(16, temperature=1.0, seed=3)).ids
    other = engine.generate(ids, Settings(16, temperature=1.0, seed=4)).ids
    assert first == again != other


@pytest.mark.parametrize("split", [1, 3, 9])
def test_stop_strings(engine: Engine, split: int) -> None:
    ids = engine.encode(PROMPT)
    whole = engine.generate(ids, Settings(30)).text
    stop = whole[12 : 12 + split]
    pieces: list[str] = []
    result = engine.generate(ids, Settings(30, stop=("never\x00", stop)), lambda text, _: pieces.append(text))
    assert result.finish == "stop" and result.text == whole[: whole.index(stop)] == "".join(pieces)


def test_top_k_0_is_off(engine: Engine) -> None:
    """transformers takes 50 where it is told nothing."""
    for top_k in (0, 7):
        answer = Answer(engine, engine.encode(PROMPT), Settings(4, temperature=0.8, top_k=top_k))
        assert answer.sequence._sampler is not None and answer.sequence._sampler.top_k == top_k


def test_logprobs_are_those_of_the_model(engine: Engine) -> None:
    ids = engine.encode(PROMPT)
    result = engine.generate(ids, Settings(4, top_logprobs=3, repetition_penalty=1.5))
    with torch.no_grad():
        inputs = {"past_key_values": new_cache(engine.model), "position_ids": torch.arange(len(ids))[None]}
        logits = engine.original(
            torch.tensor([ids]), **inputs, use_cache=True, logits_to_keep=1, return_dict=True
        ).logits[0, -1]
    logits = logits.float().log_softmax(-1)
    first = result.logprobs[0]
    assert len(result.logprobs) == 4 and len(first.top) == 3
    assert first.logprob == pytest.approx(float(logits[first.token]), abs=1e-6)
    assert [t for t, _ in first.top] == logits.topk(3).indices.tolist()


def test_cancelling_keeps_what_was_computed(engine: Engine) -> None:
    event = threading.Event()
    ids = engine.encode(PROMPT)
    result = engine.generate(ids, Settings(200), lambda *_: event.set(), event)
    assert result.finish == "cancelled" and len(result.ids) < 10
    assert engine.generate(ids, Settings(4)).reused_tokens == len(ids) - 1


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python's own handler: in the background of a shell tests start with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_stops_the_answer_and_not_the_program(engine: Engine, interruptible: None) -> None:
    before, threads, screen = signal.getsignal(signal.SIGINT), set(), io.StringIO()

    def ask(on_text: Any, cancelled: threading.Event) -> Result:
        def said(piece: str, logprobs: Any) -> None:
            on_text(piece, logprobs)
            threads.add(threading.current_thread())
            signal.raise_signal(signal.SIGINT)

        return engine.generate(engine.encode(PROMPT), Settings(200), said, cancelled)

    result = stream_answer(Console(file=screen), ask, engine.meter_line)
    assert result.finish == "cancelled" and len(result.ids) < 10 and screen.getvalue() == result.text + "\n"
    assert signal.getsignal(signal.SIGINT) is before and threads == {threading.main_thread()}
    with pytest.raises(KeyboardInterrupt):  # the second one
        stream_answer(Console(file=screen), lambda **_: [signal.raise_signal(signal.SIGINT) for _ in "12"], str)


def test_the_live_line_goes_when_the_answer_is_there(engine: Engine) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=200)

    def ask(on_text: Any, cancelled: threading.Event) -> str:
        for piece in ("one ", "two ", "three"):
            on_text(piece, ())
            time.sleep(0.3)
        return "done"

    assert stream_answer(console, ask, lambda rate, tokens: f"<{tokens} at {rate:.0f}>", monitor=True) == "done"
    shown = screen.getvalue()
    assert "<2 at 3>" in shown and "<" not in shown.rpartition("one two three")[2]


def test_what_compiling_took_is_not_in_the_rates() -> None:
    numbers = {"ids": [1] * 11, "calls": 11, "first_token_s": 1.0, "seconds": 4.0, "prompt_tokens": 3}
    rest = {"text": "", "finish": "length", "reused_tokens": 0, "reuse_note": "", "drafted": 0, "accepted": 0}
    result = Result(**numbers, **rest, compiled=2, compile_calls=1, compile_s=2.1)
    assert result.tokens_per_second == result.calls_per_second == pytest.approx(9 / 0.9)
    assert dataclasses.replace(result, ids=[1, 1], seconds=3.1).tokens_per_second == 0


def test_the_context_ends_the_text(engine: Engine) -> None:
    ids = models.sample_ids(engine.context - 3)[0].tolist()
    result = engine.generate(ids, Settings(50, ignore_eos=True))
    assert len(result.ids) == 3 and result.finish == "length"


def test_bad_requests(engine: Engine) -> None:
    with pytest.raises(RequestError, match="empty"):
        engine.generate([], Settings())
    with pytest.raises(RequestError, match="context of 2048") as caught:
        engine.generate([5] * 2048, Settings())
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(RequestError, match="token ids"):
        engine.generate([99999], Settings())
    with pytest.raises(OptionError, match="temperature: got -1"):
        Settings(temperature=-1)
    with pytest.raises(OptionError, match="top_p: got 0"):
        Settings(top_p=0)


def test_unfinished_characters_are_held_back(engine: Engine) -> None:
    text = "naïve 🦄 x"
    stream = TextStream(engine.tokenizer, ("zzz",))
    ids = engine.tokenizer(text, add_special_tokens=False).input_ids
    pieces = [stream.add(token) for token in ids]
    assert "".join(pieces) + stream.flush() == text
    assert not any("\ufffd" in piece for piece in pieces) and "" in pieces


def test_bytes_that_are_no_text_do_not_stop_the_stream(engine: Engine) -> None:
    """A sampling model emits invalid UTF-8 now and then."""
    stream = TextStream(engine.tokenizer)
    ids = engine.tokenizer.convert_tokens_to_ids(["<0xC3>"] * 9) + engine.encode("~ a film")
    text = "".join(map(stream.add, ids)) + stream.flush()
    assert text.endswith("~ a film") and set(text.removesuffix("~ a film")) == {"\ufffd"}


def test_a_chat_computes_each_turn_once(engine: Engine) -> None:
    chat = Conversation(engine, Settings(12))
    first = chat.ask("Tell me of the film")
    second = chat.ask("And the water?")
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2
    known = first.prompt_tokens + len(first.ids)
    assert second.reused_tokens >= known - 1, "the answer's own tokens are known, but for the last one"
    assert second.prompt_tokens > known


def test_a_chat_goes_back(engine: Engine) -> None:
    chat = Conversation(engine, Settings(12))
    assert chat.retry() is None and not chat.undo()
    chat.system("Be brief")
    first = chat.ask("Tell me of the film")
    again = chat.retry()
    assert again is not None and again.text == first.text and again.reused_tokens == first.prompt_tokens - 1
    assert chat.undo() and [m["role"] for m in chat.messages] == ["system"]
    with pytest.raises(RequestError, match="context of 2048"):
        chat.ask("word " * 3000)
    assert len(chat.messages) == 1, "a refused question leaves no trace"


def test_a_model_without_a_template_is_no_chat_model(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.tokenizer, "chat_template", None)
    with pytest.raises(RequestError, match="no chat template"):
        Conversation(engine).ask("Hello")


def test_the_profiler_shows_our_ops(engine: Engine) -> None:
    ids = engine.encode(PROMPT)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        engine.generate(ids, Settings(5, ignore_eos=True))
    counts = {event.key: event.count for event in profile.key_averages()}
    layers = engine.config.num_hidden_layers
    for op in ("int8_qkv", "int8_attention", "int4_ffn"):
        assert counts.get(f"unicorn::{op}") == 5 * layers, counts
