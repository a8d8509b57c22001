"""`generate()` with the native choice of tokens gives those of transformers' own loop."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from transformers import GenerationMixin
from transformers.generation import LogitsProcessor, LogitsProcessorList

from unicorn_backend.generation.choose import Sampler
from unicorn_backend.integration import token_choice
from unicorn_backend.integration.token_choice import with_native_choice

SETTINGS: list[dict[str, Any]] = [
    {"do_sample": False},
    {"do_sample": False, "repetition_penalty": 1.3},
    {"do_sample": True},
    {"do_sample": True, "top_k": 0},
    {"do_sample": True, "top_k": 0, "top_p": 0.9},
    {"do_sample": True, "top_k": 40, "top_p": 0.9, "temperature": 0.7, "repetition_penalty": 1.2},
    {"do_sample": True, "min_p": 0.05},
    {"do_sample": True, "num_return_sequences": 3},
]


@pytest.fixture
def compiled(two_layers: Any) -> Any:
    return torch.compile(two_layers, backend="unicorn")


def test_the_loop_of_this_transformers_is_known(compiled: Any) -> None:
    assert token_choice._unknown(GenerationMixin._sample.__wrapped__) == ""


def test_the_same_tokens(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(3, 4000, (1, 12))
    ours, plain = GenerationMixin._sample, GenerationMixin._sample.__wrapped__
    for settings in SETTINGS:
        drawn = []
        for loop in (ours, plain):
            monkeypatch.setattr(GenerationMixin, "_sample", loop)
            torch.manual_seed(3)
            drawn.append((compiled.generate(ids, max_new_tokens=40, min_new_tokens=40, **settings), torch.rand(2)))
        assert torch.equal(drawn[0][0], drawn[1][0]), settings
        assert torch.equal(drawn[0][1], drawn[1][1]), settings


def test_scores_are_those_after_all_processors(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"do_sample": True, "top_k": 7, "output_scores": True, "return_dict_in_generate": True}
    ids = torch.randint(3, 4000, (1, 12))
    drawn = []
    for loop in (GenerationMixin._sample, GenerationMixin._sample.__wrapped__):
        monkeypatch.setattr(GenerationMixin, "_sample", loop)
        torch.manual_seed(3)
        drawn.append(torch.stack(compiled.generate(ids, max_new_tokens=5, min_new_tokens=5, **settings).scores))
    assert torch.equal(*drawn) and 7 <= drawn[0].isfinite().sum(-1).max() < 100


def test_native_ops_choose(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    plain = Sampler.__call__
    monkeypatch.setattr(Sampler, "__call__", lambda self, *a: chosen.append(self.top_k) or plain(self, *a))
    compiled.generate(torch.randint(3, 4000, (1, 12)), max_new_tokens=4, min_new_tokens=4, do_sample=True, top_k=9)
    assert chosen == [9] * 4


def test_models_that_are_not_ours_keep_the_loop(compiled: Any, make_tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sampler, "__call__", lambda *a: pytest.fail("another model"))
    make_tiny().generate(torch.randint(3, 4000, (1, 12)), max_new_tokens=2, do_sample=True)


def test_processors_of_other_kinds_stay() -> None:
    from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    class Own(TopKLogitsWarper):
        pass

    class Nothing(LogitsProcessor):
        pass

    temperature, k, p = TemperatureLogitsWarper(0.7), TopKLogitsWarper(5), TopPLogitsWarper(0.9)
    filled = TopKLogitsWarper(5, filter_value=-9.0)
    for processors, left in (
        ([temperature, k, p], [temperature]),
        ([k], []),
        ([p], []),
        ([k, p, temperature], [k, p, temperature]),
        ([p, k], [p]),
        ([own := Own(5)], [own]),
        ([filled, p], [filled]),
        ([nothing := Nothing(), k], [nothing]),
    ):
        assert Sampler(LogitsProcessorList(processors)).before == left
        assert Sampler(processors, whole=True).before == processors


def another_loop(
    self: Any, input_ids: Any, logits_processor: Any, stopping_criteria: Any, generation_config: Any
) -> None:
    next_token_scores = logits_processor(input_ids, input_ids)
    next_token_scores.argmax(-1)


def test_another_loop_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    for loop in (another_loop, len, lambda self: None):
        with caplog.at_level(logging.INFO):
            assert with_native_choice(loop, lambda model: True) is loop
    assert "has no single torch.argmax(next_token_scores,dim=-1)" in caplog.text
    assert "is not a plain function" in caplog.text and "has other parameters" in caplog.text
