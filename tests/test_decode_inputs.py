"""Short ways around transformers' decoding loop: the same inputs and the same end, or transformers' own way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationMixin
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, StoppingCriteria, StoppingCriteriaList
from transformers.utils import ModelOutput

from unicorn_backend.integration import decode_inputs, model_state
from unicorn_backend.integration.decode_inputs import with_short_way
from unicorn_backend.integration.stopping import Stopping
from unicorn_backend.integration.transformers_hooks import cache_argument

NEW = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@pytest.fixture
def shorts(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The inputs that went the short way, those of the comparison included."""
    seen: list[dict[str, Any]] = []
    plain = decode_inputs._short

    def short(*args: Any) -> dict[str, Any]:
        seen.append(plain(*args))
        return seen[-1]

    monkeypatch.setattr(decode_inputs, "_short", short)
    return seen


def test_generate_goes_the_short_way(two_layers: Any, shorts: list[Any]) -> None:
    compiled: Any = torch.compile(two_layers, backend="unicorn")
    ids = torch.randint(3, 4000, (1, 12))
    tokens = compiled.generate(ids, **NEW)
    assert len(shorts) == 5, "six tokens, the first one from the prompt"
    assert torch.equal(torch.cat([inputs["input_ids"] for inputs in shorts], dim=1), tokens[:, 12:-1])
    assert not model_state.thread.held


def test_the_update_goes_the_short_way(two_layers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    plain = decode_inputs._longer_by_one

    def longer(kwargs: dict[str, Any]) -> dict[str, Any]:
        calls.append(plain(kwargs))
        return calls[-1]  # type: ignore[no-any-return]

    monkeypatch.setattr(decode_inputs, "_longer_by_one", longer)
    compiled: Any = torch.compile(two_layers, backend="unicorn")
    ids = torch.randint(3, 4000, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    compiled.generate(ids, attention_mask=mask, **NEW)
    assert len(calls) == 6, "one per token"
    assert [kwargs["attention_mask"].shape[1] for kwargs in calls] == list(range(13, 19))
    assert [kwargs["position_ids"][:, -1].tolist() for kwargs in calls] == [[8 + i, 12 + i] for i in range(6)]


@pytest.mark.parametrize("positions", [(3,), (2, 3), (3, 2, 3)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_the_short_update_is_transformers(positions: tuple[int, ...], dtype: torch.dtype) -> None:
    cache = DynamicCache()
    kwargs = {
        cache_argument(): cache,
        "position_ids": torch.arange(3).expand(positions).contiguous(),
        "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]], dtype=dtype),
        "use_cache": True,
    }
    short = decode_inputs._longer_by_one(kwargs)
    plain: Any = GenerationMixin._update_model_kwargs_for_generation
    plain = getattr(plain, "__wrapped__", plain)
    assert decode_inputs._same(plain(None, ModelOutput({cache_argument(): cache}), dict(kwargs)), short)
    assert kwargs["attention_mask"].shape == (2, 3), "what was given stays as it was"


@pytest.mark.parametrize(
    "settings", [{}, {"num_return_sequences": 2}, {"num_beams": 2}, {"cache_implementation": "static"}]
)
def test_the_same_tokens(settings: dict[str, Any], two_layers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: Any = torch.compile(two_layers, backend="unicorn")
    ids = torch.randint(3, 4000, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    settings = {**NEW, "attention_mask": mask, **settings, "do_sample": "num_return_sequences" in settings}
    drawn = []
    for wrapped in (True, False):
        for name in ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation"):
            method: Any = getattr(GenerationMixin, name)
            monkeypatch.setattr(GenerationMixin, name, method if wrapped else method.__wrapped__)
        torch.manual_seed(0)
        drawn.append(compiled.generate(ids, **settings))
    assert torch.equal(*drawn)


def test_what_differs_goes_the_long_way() -> None:
    calls: list[str] = []

    def plain(self: Any, input_ids: Any, next_sequence_length: Any = None, **kwargs: Any) -> dict[str, Any]:
        calls.append("plain")
        return {"input_ids": input_ids[:, -1:].clone(), "cache": kwargs["cache"], "use_cache": True, "more": 1}

    prepare = with_short_way(plain, "cache", lambda model: True)
    kwargs = {"next_sequence_length": 1, "cache": DynamicCache(), "use_cache": True}
    with model_state.one_state():
        for _ in range(3):
            assert prepare("model", torch.zeros(1, 4, dtype=torch.long), **kwargs)["more"] == 1
    assert calls == ["plain"] * 3


def test_only_known_arguments_of_our_models_within_generate(shorts: list[Any]) -> None:
    def plain(self: Any, input_ids: Any, **kwargs: Any) -> dict[str, Any]:
        return {}

    ids, cache = torch.zeros(1, 4, dtype=torch.long), DynamicCache()
    one = {"next_sequence_length": 1, "cache": cache}
    with_short_way(plain, "cache", lambda model: True)("model", ids, **one)  # outside of generate
    with model_state.one_state():
        with_short_way(plain, "cache", lambda model: False)("model", ids, **one)
        ours = with_short_way(plain, "cache", lambda model: True)
        ours("model", ids, **{**one, "next_sequence_length": 2})
        ours("model", ids, **one, token_type_ids=ids)
        ours("model", ids, next_sequence_length=1, cache=None)
    assert not shorts


def test_the_name_of_the_cache() -> None:
    assert cache_argument() in ("cache", "past_key_values")


class Counted(StoppingCriteria):
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.calls += 1
        return input_ids[:, -1] == 9


@pytest.mark.parametrize("others", [0, 1])
@pytest.mark.parametrize("rows", [1, 2])
def test_stopping_answers_the_same(others: int, rows: int) -> None:
    own = [Counted() for _ in range(others)]
    criteria = StoppingCriteriaList([MaxLengthCriteria(6, 8), EosTokenCriteria([3, 5]), MaxLengthCriteria(7), *own])
    stopping = Stopping(criteria)
    assert list(stopping) == list(criteria) and stopping.max_length == 6
    for length in range(1, 10):
        for last in (1, 3, 5, 9):
            ids = torch.ones(rows, length, dtype=torch.long)
            ids[0, -1] = last
            got, wanted = stopping(ids, None), criteria(ids, None)
            assert torch.equal(got, wanted) and got.dtype == wanted.dtype
    assert all(one.calls == 2 * 9 * 4 for one in own)
