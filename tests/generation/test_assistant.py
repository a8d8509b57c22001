"""Drafts of an assistant model: they never change the text, and stop where they do not pay."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from unicorn_backend import models
from unicorn_backend.errors import OptionError
from unicorn_backend.generation.assistant import Assistant, AssistedDrafter, Experience
from unicorn_backend.generation.drafting import Credit, Drafter
from unicorn_backend.generation.engine import Engine
from unicorn_backend.generation.request import Settings


@pytest.fixture
def assisted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The engine with itself as assistant, without drafts from repeated text, at costs that make every draft pay."""
    costs: Any = SimpleNamespace(seconds=lambda _: 1.0, relative=lambda _: 1.0, took=lambda *_: None, credit=Credit())
    assistant = Assistant("tiny", None, engine.tokenizer, model=engine.original)
    assistant.warm_up([5, 6, 7])
    monkeypatch.setattr(assistant.experience.costs, "seconds", lambda _: 1e-9)
    monkeypatch.setattr(assistant.experience.credit, "allows", lambda _: True)
    monkeypatch.setattr(engine, "assistant", assistant)

    def drafter(_: Settings) -> AssistedDrafter:
        lookup = Drafter(max_draft=0, costs=costs)
        return AssistedDrafter(assistant, lookup, engine.config.vocab_size)

    monkeypatch.setattr(engine, "drafter", drafter)
    return engine


def both(engine: Engine, ids: list[int], **settings: Any) -> tuple[Any, Any]:
    plain, fast = (engine.generate(ids, Settings(**settings, speculate=s, ignore_eos=True)) for s in (False, True))
    assert plain.ids == fast.ids and plain.text == fast.text
    return plain, fast


def test_a_model_agrees_with_itself(assisted: Engine) -> None:
    """Past the sliding window of 128, too, and again with the keys and values of the turn before."""
    ids = models.sample_ids(150)[0].tolist()
    for _ in "12":
        plain, fast = both(assisted, ids, max_new_tokens=40)
        assert fast.drafted == fast.accepted > 20 and fast.calls < 20 < plain.calls
    assert len(assisted.assistant.prefixes) == 1


def test_wrong_drafts_are_taken_back(assisted: Engine) -> None:
    _, fast = both(assisted, models.sample_ids(30)[0].tolist(), max_new_tokens=120, temperature=0.7, seed=1)
    assert 0 < fast.accepted < fast.drafted


def scripted(each: float, right: bool, tokens: int = 400) -> tuple[int, int]:
    """Drafted tokens and calls of a sequence with an assistant that is always right, or never; a call takes 1 s."""
    assistant: Any = SimpleNamespace(experience=Experience())
    drafter = AssistedDrafter(assistant, Drafter(max_draft=0), 100)
    drafter.draft = lambda count: [7 if right else 8] * count  # type: ignore[method-assign]
    for _ in "123":
        assistant.experience.costs.took(1, each)
    drafted = calls = 0
    while calls < tokens:
        draft = drafter.propose(100)
        assistant.experience.spent(each * len(draft), drafter._trying)
        drafter.extend([7] * (len(draft) + 1 if right else 1))
        drafter.took(len(draft) + 1, 1.0 + 0.1 * len(draft), len(draft) if right else 0)
        drafted, calls = drafted + len(draft), calls + 1
    return drafted, calls


def test_drafts_only_where_they_pay() -> None:
    assert scripted(0.1, True)[0] > 7 * 380  # nearly always the longest draft
    assert 2 < scripted(0.1, False)[0] < 30
    assert scripted(1.0, True)[0] <= 2  # as slow as the model itself: not even if always right


def test_another_vocabulary_is_refused() -> None:
    class Other:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

    with pytest.raises(OptionError, match="another vocabulary"):
        Assistant("tiny", None, Other())
