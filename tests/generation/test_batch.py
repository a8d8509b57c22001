"""Answers decoded together are, bit for bit, those of each request alone, whoever comes and goes beside it."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import torch

from tests.engines import make_engine
from unicorn_backend import models
from unicorn_backend.errors import RequestError
from unicorn_backend.generation import batch as batches
from unicorn_backend.generation import prefix
from unicorn_backend.generation.batch import Batch
from unicorn_backend.generation.drafting import Costs
from unicorn_backend.generation.engine import Engine
from unicorn_backend.generation.request import Result, Settings
from unicorn_backend.integration.model_state import one_state

TEXT: list[int] = models.sample_ids(900)[0].tolist()
WINDOW = 128
Request = tuple[list[int], Settings]

# Prompts below, at and beyond the window; some cross it while they are decoded, one is computed in three parts.
REQUESTS: list[Request] = [
    (TEXT[:30], Settings(24, ignore_eos=True, top_logprobs=2)),
    (TEXT[100:105], Settings(9, temperature=1.0, seed=3, ignore_eos=True)),
    (TEXT[:120], Settings(30, temperature=0.7, top_p=0.9, top_k=20, seed=4, ignore_eos=True, top_logprobs=0)),
    (TEXT[5:6], Settings(12, repetition_penalty=1.4, ignore_eos=True)),
    (TEXT[200 : 200 + 2 * batches.CHUNK + 70], Settings(14, ignore_eos=True, top_logprobs=1)),
    (TEXT[300:431], Settings(20, stop=("e",))),
    (TEXT[400:410], Settings(1)),
    (TEXT[:30], Settings(18, temperature=1.0, seed=5, ignore_eos=True)),
]


@pytest.fixture
def engine(engine: Engine) -> Engine:
    engine.prefixes.budget_bytes = 0  # what was computed before is not what is tested
    return engine


def alone(engine: Engine, request: Request) -> Result:
    (result,) = engine.generate_many([request])
    assert result.shared_calls == result.calls
    return result


def assert_same(got: Result, want: Result) -> None:
    assert (got.ids, got.text, got.finish, got.logprobs) == (want.ids, want.text, want.finish, want.logprobs)


@pytest.fixture(scope="module")
def wanted(shared_engine: Engine) -> list[Result]:
    shared_engine.prefixes.budget_bytes = 0
    return [alone(shared_engine, request) for request in REQUESTS]


@pytest.mark.parametrize("rows", [3, 8])
def test_answers_together_are_those_alone(engine: Engine, wanted: list[Result], rows: int) -> None:
    got = engine.generate_many(REQUESTS, rows)
    for one, want in zip(got, wanted, strict=True):
        assert_same(one, want)
    calls = [one.shared_calls for one in got]
    assert sum(calls) < 0.8 * sum(one.calls for one in got), calls


def test_one_row_is_generate_itself(engine: Engine) -> None:
    want = [engine.generate(*request) for request in REQUESTS[:5]]
    for one, result in zip(engine.generate_many(REQUESTS[:5], rows=1), want, strict=True):
        assert_same(one, result)


def test_batches_of_all_sizes_share_a_graph(engine: Engine, wanted: list[Result]) -> None:
    engine.generate_many(REQUESTS[:2])
    assert sum(one.compiled for one in engine.generate_many(REQUESTS)) == 0


def test_comings_and_goings_at_random(engine: Engine, wanted: list[Result]) -> None:
    """Some are cancelled, before their prompt is computed or in the middle; the others do not notice."""
    chance, outcomes = random.Random(1), dict[int, Any]()
    sizes: list[int] = []
    running = Batch(engine, 4, on_step=sizes.append)
    events = {index: threading.Event() for index in range(3 * len(REQUESTS))}
    waiting = list(events)
    chance.shuffle(waiting)
    with one_state():
        while waiting or running:
            while waiting and running.has_room and chance.random() < 0.3:
                index = waiting.pop()
                ids, settings = REQUESTS[index % len(REQUESTS)]
                running.add(index, ids, settings, cancelled=events[index])
            if index := chance.choice((0, 0, 0, *range(2 * len(REQUESTS), 3 * len(REQUESTS)))):
                events[index].set()
            outcomes.update(running.step())
    assert sorted(outcomes) == sorted(events) and set(sizes) == {1, 2, 3, 4}
    for index, outcome in outcomes.items():
        want = wanted[index % len(REQUESTS)]
        if outcome.finish == "cancelled":
            assert index >= 2 * len(REQUESTS) and outcome.ids == want.ids[: len(outcome.ids)]
        else:
            assert_same(outcome, want)


def test_rows_of_int8_compile_nothing_after_warming_up(tiny_weights: dict[str, torch.Tensor]) -> None:
    engine = make_engine(tiny_weights, kv="int8")
    engine.warm_up(rows=2)
    engine.prefixes.budget_bytes = 0
    want = [alone(engine, request) for request in REQUESTS[:3]]
    for one, result in zip(engine.generate_many(REQUESTS[:3]), want, strict=True):
        assert_same(one, result)
        assert one.compiled == result.compiled == 0
    assert prefix.new_cache(engine.model).layers[0].__class__.__name__.startswith("Int8")


def test_who_leaves_takes_its_keys_along(engine: Engine) -> None:
    """The next turn computes only what is new, and says what it says to a history computed alone."""
    engine.prefixes.budget_bytes = 1 << 30
    firsts = [(TEXT[start : start + 20 + start // 2], Settings(6 + start // 20)) for start in (0, 100, 240)]
    results = engine.generate_many(firsts)
    turns = [
        ([*ids, *result.ids, *TEXT[500:509]], Settings(8)) for (ids, _), result in zip(firsts, results, strict=True)
    ]
    seconds = engine.generate_many(turns)
    assert [len(ids) - one.reused_tokens for (ids, _), one in zip(turns, seconds, strict=True)] == [10, 10, 10]
    engine.prefixes.clear()
    for turn, first, second in zip(turns, firsts, seconds, strict=True):
        engine.generate_many([first])
        assert_same(alone(engine, turn), second)
    assert not any(row.keys is None for entry in engine.prefixes._entries for row in entry.cache.layers)


def test_requests_that_begin_alike_share_it_at_once(engine: Engine) -> None:
    engine.prefixes.budget_bytes = 1 << 30
    first, second = engine.generate_many([(TEXT[:90], Settings(9)), (TEXT[:80] + TEXT[300:310], Settings(9))])
    assert (first.reused_tokens, second.reused_tokens) == (0, 80)


@pytest.fixture
def two() -> list[Request]:
    return [(TEXT[:30], Settings(12, ignore_eos=True)), (TEXT[50:90], Settings(12, ignore_eos=True))]


def test_who_does_not_fit_waits(
    engine: Engine, two: list[Request], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def one_after_another(batch: Batch) -> None:
        for index, request in enumerate(two):
            batch.add(index, *request)
        outcomes = dict[int, Any]()
        while batch:
            outcomes.update(batch.step())
        for index, want in enumerate(wanted):
            assert_same(outcomes[index], want)
            assert outcomes[index].shared_calls == want.calls

    wanted = [alone(engine, request) for request in two]
    one_after_another(Batch(engine, memory_bytes=60_000))
    assert "would take more than 60.0 kB" in caplog.text
    monkeypatch.setattr(prefix, "growing_layers", tuple)
    one_after_another(Batch(engine))
    assert "DynamicLayer, DynamicSlidingWindowLayer, which cannot be put together" in caplog.text


def test_a_failure_is_its_own(engine: Engine, two: list[Request]) -> None:
    def broken(*_: Any) -> bool:
        raise RuntimeError("out of unicorns")

    want = alone(engine, two[0])
    running = Batch(engine)
    running.add("good", *two[0])
    running.add("bad", *two[1], on_text=broken)
    running.add("empty", [], Settings())
    outcomes = dict[str, Any]()
    while running:
        outcomes.update(running.step())
    assert_same(outcomes["good"], want)
    assert str(outcomes["bad"]) == "out of unicorns" and isinstance(outcomes["empty"], RequestError)
    with pytest.raises(RequestError, match="empty"):
        engine.generate_many([two[0], ([], Settings())])


def test_drafts_of_who_is_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the other comes and after it left; the text is that without."""
    ids = TEXT[:40] * 3
    plain = engine.generate_many([(ids, Settings(60, ignore_eos=True))])[0]
    costs = Costs()  # not what a busy machine measures
    monkeypatch.setattr(costs, "took", lambda *_: None)
    monkeypatch.setattr(engine, "_costs", costs)
    fast, _ = engine.generate_many([(ids, Settings(60, ignore_eos=True, speculate=True)), (TEXT[:30], Settings(5))])
    assert fast.ids == plain.ids and fast.calls < plain.calls and fast.accepted > 0
