"""`generate()` and our own loop screen the head where only the largest scores count, and give the same tokens."""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from unicorn_backend import assets, layouts, measure
from unicorn_backend.generation.choose import Sampler, best_of
from unicorn_backend.generation.engine import Engine
from unicorn_backend.generation.request import Settings
from unicorn_backend.integration import model_state, screening

pytestmark = [
    pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="weights are bound with torch 2.13"),
    pytest.mark.skipif(not assets.isa().startswith("avx512"), reason="heads are screened with AVX-512"),
]
NEW = {"max_new_tokens": 24, "min_new_tokens": None, "eos_token_id": None, "do_sample": False}


@pytest.fixture(autouse=True)
def small_heads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The embedded model's 4096 rows are few enough to be in the cache: screened here all the same."""
    monkeypatch.setattr(screening, "LEAST_ROWS", 1024)
    yield
    assert model_state.thread.best is None and model_state.thread.best_in_loop is None


@pytest.fixture
def compiled(two_layers: Any) -> Any:
    return torch.compile(two_layers, backend="unicorn")


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 4000, (1, 12))


def _calls(model: Any) -> int:
    return screening.saved(model).calls


SETTINGS: list[dict[str, Any]] = [
    {},
    {"do_sample": True, "top_k": 5},
    {"do_sample": True, "top_k": 64, "top_p": 0.9, "temperature": 0.7},
]


def test_the_same_tokens(compiled: Any, ids: torch.Tensor) -> None:
    for settings in SETTINGS:
        drawn = []
        before = screening.saved(compiled)
        for extra in ({}, {"output_logits": True, "return_dict_in_generate": True}):  # who wants logits gets all
            torch.manual_seed(3)
            out = compiled.generate(ids, **{**NEW, **settings}, **extra)
            assert _calls(compiled) - before.calls == 24
            drawn.append(out.sequences if extra else out)
        assert torch.equal(*drawn), settings
        saved = screening.saved(compiled)
        assert saved.copied == pytest.approx(0.75 * saved.head, rel=0.1)
        assert saved.per_call(before) > (0.2 * saved.head if not settings else -0.1 * saved.head)  # 64 are no gain


def test_a_vocabulary_that_fills_no_tile(two_layers: Any, ids: torch.Tensor) -> None:
    two_layers.resize_token_embeddings(4101)
    compiled: Any = torch.compile(two_layers, backend="unicorn")
    new = compiled.generate(ids, **NEW)
    out = compiled.generate(ids, output_logits=True, return_dict_in_generate=True, **NEW)
    assert torch.equal(new, out.sequences) and _calls(compiled) == 24


class _Favour(LogitsProcessor):
    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(1, torch.tensor([77]), 1e4)


def test_not_where_other_scores_count(compiled: Any, ids: torch.Tensor) -> None:
    for settings in (
        {"repetition_penalty": 1.3},
        {"logits_processor": LogitsProcessorList([_Favour()])},
        {"do_sample": True, "top_k": 0},
        {"do_sample": True, "top_k": 5, "repetition_penalty": 1.3},
        {"do_sample": True, "top_k": 5, "output_scores": True, "return_dict_in_generate": True},
        {"output_logits": True, "return_dict_in_generate": True},
        {"num_beams": 2},
    ):
        compiled.generate(ids, **{**NEW, **settings})  # type: ignore[dict-item]
        assert _calls(compiled) == 0, settings


def test_not_in_calls_of_one_s_own(compiled: Any, ids: torch.Tensor) -> None:
    """What a streamer asks of the model in between is whole, and so is what comes after it."""
    token, seen = ids[:, -1:], []

    class Asks:
        def put(self, value: torch.Tensor) -> None:
            seen.append(bool(compiled(token).logits.isfinite().all()))

        def end(self) -> None: ...

    compiled.generate(ids, streamer=Asks(), **NEW)
    assert len(seen) == 25 and all(seen) and _calls(compiled) == 24
    with torch.no_grad():
        assert bool(compiled(token).logits.isfinite().all())


def test_another_model_in_the_loop_is_read_whole(compiled: Any, ids: torch.Tensor) -> None:
    other = torch.compile(copy.deepcopy(compiled._orig_mod), backend="unicorn")
    whole = []

    def criterion(tokens: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        whole.append(bool(other(tokens[:, -1:]).logits.isfinite().all()))
        return torch.zeros(tokens.shape[0], dtype=torch.bool)

    compiled.generate(ids, stopping_criteria=[criterion], **NEW)
    assert _calls(compiled) == 24 and len(whole) == 24 and all(whole) and _calls(other) == 0


def test_a_forward_of_one_s_own_sees_all(two_layers: Any, ids: torch.Tensor) -> None:
    class Own(type(two_layers)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    two_layers.__class__ = Own
    compiled: Any = torch.compile(two_layers, backend="unicorn")
    compiled.generate(ids, **NEW)
    assert _calls(compiled) == 0


def test_changed_weights_are_split_again() -> None:
    weights = layouts.pack_w8(torch.randint(0, 255, (2048, 32), dtype=torch.uint8), torch.rand(2048))
    first = screening.screen_of(weights)
    assert screening.screen_of(weights) is first
    for part in weights:
        part.copy_(part.flip(0))
        assert screening.screen_of(weights) is not first
        first = screening.screen_of(weights)


def test_the_copy_goes_with_the_weight() -> None:
    weights = layouts.pack_w8(torch.zeros(2048, 32, dtype=torch.uint8), torch.rand(2048))
    gc.collect()
    before = len(screening._screens)
    assert screening.screen_of(weights) is not None and len(screening._screens) == before + 1
    weights.clear()
    gc.collect()
    assert len(screening._screens) == before


def test_reasons(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def head(n: int, scale: float = 0.1) -> list[torch.Tensor]:
        return layouts.pack_w8(torch.zeros(n, 32, dtype=torch.uint8), torch.full((n,), scale))

    four = layouts.pack_w4g32(torch.zeros(2048, 32, dtype=torch.int8), torch.ones(2048, 1, dtype=torch.float16))
    kept = head(2048)
    kept = [torch.classes.unicorn.Arena.leave(kept[0], False), kept[1]]
    for weights, reason in (
        (head(512), "512 rows"),
        (four, "not 8 bits"),
        (head(2048, -0.1), "scales"),
        (head(2048, float("nan")), "scales"),
        (kept, "stays in its file"),
    ):
        with caplog.at_level(logging.INFO, logger=screening.log.name):
            assert screening.screen_of(weights) is None and screening.screen_of(weights) is None
        assert [reason in record.message for record in caplog.records] == [True], "once"
        caplog.clear()
    monkeypatch.setattr(measure, "ram", lambda: (1 << 30, 1 << 10))
    with caplog.at_level(logging.INFO, logger=screening.log.name):
        assert screening.screen_of(head(2048)) is None
    assert "too much for 0.0 GB of RAM" in caplog.text
    monkeypatch.undo()
    monkeypatch.setattr(screening, "LEAST_ROWS", 1024)
    assert screening.screen_of(head(2048)) is not None


def test_our_own_loop() -> None:
    engine = Engine("tiny")
    prompt = engine.tokenizer.encode("The film is a")
    for settings, screened in (
        (Settings(max_new_tokens=12), True),
        (Settings(max_new_tokens=12, temperature=0.8, top_k=20, seed=1), True),
        (Settings(max_new_tokens=12, top_logprobs=2), False),
        (Settings(max_new_tokens=12, temperature=0.8, seed=1), False),
    ):
        before = _calls(engine.model)
        result = engine.generate(prompt, settings)
        assert (_calls(engine.model) > before) is screened
        if result.logprobs:
            assert all(len(one.top) == 2 and one.top[1][1] > -100 for one in result.logprobs)


def test_how_many_scores_count() -> None:
    from transformers.generation import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper

    top, warm, penalty = TopKLogitsWarper(7), TemperatureLogitsWarper(0.5), RepetitionPenaltyLogitsProcessor(1.2)
    assert best_of([], None) == 1
    assert best_of([penalty], None) == 0
    for processors, best in (([warm, top], 7), ([penalty, top], 0), ([warm], 0), ([], 0)):
        assert best_of(processors, Sampler(processors)) == best
    assert best_of([top], Sampler([top], whole=True)) == 0
