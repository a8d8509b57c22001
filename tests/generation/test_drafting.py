"""Drafts: right where text repeats, none where it does not, and by measured cost."""

from __future__ import annotations

import random

import pytest

from unicorn_backend import models
from unicorn_backend.generation.drafting import LOSS, MAX_DRAFT, MOST_CREDIT, Costs, Credit, Drafter
from unicorn_backend.generation.engine import Engine
from unicorn_backend.generation.request import Settings

LOOP = [11, 12, 13, 14, 15, 16, 17, 18, 19, 20]


def test_a_loop_is_drafted_to_the_full_length() -> None:
    drafter = Drafter()
    drafter.extend(LOOP * 4)
    assert drafter.propose(100) == LOOP[:MAX_DRAFT]
    assert drafter.propose(3) == LOOP[:3] and drafter.propose(0) == []


def test_a_short_loop_goes_on_past_its_end() -> None:
    drafter = Drafter()
    drafter.extend([5, 6] * 12)
    assert drafter.propose(100) == [5, 6, 5, 6, 5, 6, 5]


def test_fresh_text_is_not_drafted() -> None:
    """Contexts recur in it, but what follows does not: that is learned without checking a single draft."""
    generator = random.Random(0)
    drafter, drafts = Drafter(), 0
    for _ in range(2000):
        drafter.extend([generator.randrange(30)])
        drafts += bool(drafter.propose(100))
    assert drafts < 20


def test_no_draft_without_a_context_that_occurred() -> None:
    drafter = Drafter()
    drafter.extend(range(200))
    assert drafter.propose(100) == []


def test_a_dear_call_shortens_or_stops_the_drafts() -> None:
    costs = Costs()
    for _ in range(3):
        for tokens in range(1, MAX_DRAFT + 2):
            costs.took(tokens, 0.01 * tokens)  # no gain from several tokens at once
    drafter = Drafter(costs=costs)
    drafter.extend(LOOP * 4)
    assert drafter.propose(100) == []
    assert costs.relative(8) == pytest.approx(8, rel=0.3)


def test_a_stall_is_forgotten() -> None:
    costs = Costs()
    for tokens, seconds in ((1, 9.0), (4, 9.0), (1, 0.01), (4, 0.5)):  # the first of each kind may compile
        costs.took(tokens, seconds)
    assert costs.relative(4) > 10
    for _ in range(500):
        costs.took(1, 0.01)
    assert costs.relative(4) < 2
    costs.took(4, 0.012)
    assert costs.relative(4) == pytest.approx(1.2)


def test_wrong_drafts_have_a_budget() -> None:
    """An adversary: contexts are right whenever nothing is drafted, and wrong when something is."""
    drafter, lost, calls = Drafter(), 0.0, 3000
    generator = random.Random(0)
    drafter.extend(LOOP * 20)
    drafts = 0
    for _ in range(calls):
        draft = drafter.propose(100)
        lost += drafter.costs.relative(len(draft) + 1) - 1
        drafts += bool(draft)
        expected = drafter._continuation(drafter._found[1], 1) if drafter._found[0] else LOOP[:1]
        drafter.extend([generator.randrange(100, 10**9)] + LOOP * 3 if draft else expected)
        drafter.took(len(draft) + 1, 0.01 * (1 + 0.12 * len(draft)), 0)
    assert drafts > 20 and lost <= 1 + LOSS * calls


def test_credit_is_earned_by_right_drafts_and_capped() -> None:
    credit = Credit()
    assert credit.allows(1.0) and not credit.allows(1.1)
    credit.earn(-1.0)
    assert not credit.allows(0.1)
    for _ in range(100):
        credit.earn(3.0)
    assert credit.allows(MOST_CREDIT) and not credit.allows(MOST_CREDIT + 0.01)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_text_is_that_without_speculation(engine: Engine, temperature: float) -> None:
    """Greedy, and sampled from the same seed: a draft decides how many tokens a call gives, not which."""
    ids = models.sample_ids(60)[0].tolist() * 2
    settings = {"max_new_tokens": 60, "temperature": temperature, "seed": 7, "ignore_eos": True}
    plain = engine.generate(ids, Settings(**settings))
    engine.prefixes.clear()
    fast = engine.generate(ids, Settings(**settings, speculate=True))
    assert fast.ids == plain.ids and plain.calls == 60
    assert fast.calls + fast.accepted >= 60 and fast.calls <= 60
    if temperature == 0:
        assert fast.accepted > 0


def test_verified_tokens_cost_no_further_graph(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts of every length go through the graph of a prompt on a filled cache."""
    costs = Costs()  # a busy machine's would be none that drafts pay with
    monkeypatch.setattr(costs, "took", lambda *_: None)
    monkeypatch.setattr(engine, "_costs", costs)
    ids = models.sample_ids(40)[0].tolist() * 3
    engine.generate(ids, Settings(40, ignore_eos=True, speculate=True))
    again = engine.generate(ids[:70] + ids[:30], Settings(40, ignore_eos=True, speculate=True))
    assert again.compiled == 0 and again.drafted > 0
