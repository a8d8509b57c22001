"""`generate()` and our own loop screen the head where only the largest scores count, and give the same tokens."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from unicorn_backend import assets, measure
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
    assert model_state.thread.best is None


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


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_same_tokens(compiled: Any, ids: torch.Tensor, settings: dict[str, Any]) -> None:
    drawn = []
    for extra in ({}, {"output_logits": True, "return_dict_in_generate": True}):  # who wants logits gets all
        torch.manual_seed(3)
        before = _calls(compiled)
        out = compiled.generate(ids, **{**NEW, **settings}, **extra)
        assert _calls(compiled) - before == (0 if extra else 24)
        drawn.append(out.sequences if extra else out)
    assert torch.equal(*drawn)
    saved = screening.saved(compiled)
    assert saved.copied == pytest.approx(0.75 * saved.head, rel=0.1)
    assert saved.per_call() > (0.2 * saved.head if not settings else -0.1 * saved.head)  # 64 of 4096 is no gain


def test_a_vocabulary_that_fills_no_tile(two_layers: Any, ids: torch.Tensor) -> None:
    two_layers.resize_token_embeddings(4101)
    compiled: Any = torch.compile(two_layers, backend="unicorn")
    new = compiled.generate(ids, **NEW)
    out = compiled.generate(ids, output_logits=True, return_dict_in_generate=True, **NEW)
    assert torch.equal(new, out.sequences) and _calls(compiled) == 24


class _Favour(LogitsProcessor):
    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(1, torch.tensor([77]), 1e4)


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.3},
        {"logits_processor": LogitsProcessorList([_Favour()])},
        {"do_sample": True, "top_k": 0},
        {"do_sample": True, "top_k": 5, "repetition_penalty": 1.3},
        {"do_sample": True, "top_k": 5, "output_scores": True, "return_dict_in_generate": True},
        {"num_beams": 2},
        {"output_logits": True, "return_dict_in_generate": True},
    ],
)
def test_not_where_other_scores_count(compiled: Any, ids: torch.Tensor, settings: dict[str, Any]) -> None:
    compiled.generate(ids, **{**NEW, **settings})
    assert _calls(compiled) == 0


def test_not_in_calls_of_one_s_own(compiled: Any, ids: torch.Tensor) -> None:
    """What a streamer, or anything else in between, asks of the model is whole."""
    seen = []

    class Asks:
        def put(self, value: torch.Tensor) -> None:
            if value.dim() == 1:
                with screening.choosing(compiled._orig_mod, 0):
                    seen.append(bool(compiled(ids).logits.isfinite().all()))

        def end(self) -> None: ...

    with torch.no_grad():
        compiled.generate(ids, streamer=Asks(), **NEW)
        assert seen and all(seen)
        assert bool(compiled(ids[:, -1:]).logits.isfinite().all())


def test_another_model_in_the_loop_is_read_whole(compiled: Any, make_tiny: Any, ids: torch.Tensor) -> None:
    other = torch.compile(make_tiny(), backend="unicorn")
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


def test_changed_weights_are_split_again(compiled: Any, ids: torch.Tensor) -> None:
    first = compiled.generate(ids, **NEW)
    head = compiled._orig_mod.get_output_embeddings()
    with torch.no_grad():
        head.weight_packed.copy_(head.weight_packed.flip(0).clone())
    new = compiled.generate(ids, **NEW)
    out = compiled.generate(ids, output_logits=True, return_dict_in_generate=True, **NEW)
    assert torch.equal(new, out.sequences) and not torch.equal(new, first)


def test_the_copy_goes_with_the_model(two_layers: Any, ids: torch.Tensor) -> None:
    screening._screens.clear()
    compiled: Any = torch.compile(two_layers, backend="unicorn")
    compiled.generate(ids, **NEW)
    assert len(screening._screens) == 1
    torch._dynamo.reset()
    head = compiled._orig_mod.get_output_embeddings()
    del head._buffers["weight_packed"], compiled._orig_mod.get_input_embeddings()._buffers["weight_packed"]
    gc.collect()
    assert len(screening._screens) == 0


@pytest.mark.parametrize("why", ["rows", "RAM", "bits"])
def test_reasons(
    two_layers: Any, ids: torch.Tensor, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"recipe": "ultra"} if why == "bits" else {}
    monkeypatch.setattr(screening, "LEAST_ROWS", 10_000 if why == "rows" else 1024)
    monkeypatch.setattr(measure, "ram", lambda: (1 << 30, 1 << 20 if why == "RAM" else 1 << 30))
    compiled: Any = torch.compile(two_layers, backend="unicorn", options=options)
    with caplog.at_level(logging.INFO, logger=screening.log.name):
        compiled.generate(ids, **NEW)
    assert _calls(compiled) == 0
    expected = {"rows": "4096 rows", "RAM": "too much for 0.0 GB of RAM", "bits": "not 8 bits"}[why]
    assert sum(expected in record.message for record in caplog.records) == 1


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
