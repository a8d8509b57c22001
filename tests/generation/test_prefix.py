"""Reuse of keys and values: the results of a fresh computation, whatever was known before.

The embedded model's window is 128 tokens in its sliding layers, so histories of several hundred tokens pass it.
Reuse adds up the same products, but a window that begins elsewhere than the prompt falls differently onto the lanes
and blocks of the attention kernel, whose fp32 sums are then in another order. What differs in the last bit may round
to the other neighbour in bf16: logits of up to 32 in magnitude are 2^-3 apart. Within the window all bits are equal.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from unicorn_backend import models
from unicorn_backend.generation import prefix
from unicorn_backend.generation.engine import Engine
from unicorn_backend.generation.request import Result, Settings

WINDOW = 128
BF16_STEP = 2.0**-3
NEW = Settings(max_new_tokens=6, ignore_eos=True, top_logprobs=5)
TEXT: list[int] = models.sample_ids(900)[0].tolist()


def fresh(engine: Engine, ids: list[int]) -> Result:
    """The same request without anything known."""
    kept, engine.prefixes = engine.prefixes, prefix.PrefixStore(engine.prefixes.model, 0)
    result = engine.generate(ids, NEW)
    engine.prefixes = kept
    assert result.reused_tokens == 0
    return result


def assert_same(engine: Engine, ids: list[int], reused: int) -> Result:
    """Tokens equal those of a fresh computation, log probabilities up to one bf16 step; all bits within the window."""
    result, want = engine.generate(ids, NEW), fresh(engine, ids)
    assert result.reused_tokens == reused, result.reuse_note
    assert result.ids == want.ids
    if len(ids) + len(result.ids) <= WINDOW:
        assert result.logprobs == want.logprobs
    for got, expected in zip(result.logprobs, want.logprobs, strict=True):
        assert got.logprob == pytest.approx(expected.logprob, abs=BF16_STEP)
    return result


@pytest.mark.parametrize("history", [60, 125, 129, 400])
def test_the_next_turn_reuses_the_whole_history(engine: Engine, history: int) -> None:
    """Within the window, as it fills, and beyond it."""
    first = engine.generate(TEXT[:history], NEW)
    known = TEXT[:history] + first.ids
    turn = known + TEXT[500:517]
    second = assert_same(engine, turn, reused=len(known) - 1)  # the last token was never given to the model
    assert_same(engine, turn + second.ids + TEXT[600:603], reused=len(turn) + len(second.ids) - 1)


def test_an_edited_history_is_cut_back_to_what_agrees(engine: Engine) -> None:
    engine.generate(TEXT[:600], NEW)
    edited = TEXT[:300] + TEXT[700:750]
    result = assert_same(engine, edited, reused=300)
    assert "differs after 300 of" in result.reuse_note
    # The longer conversation is still there, untouched by the one that left it.
    assert_same(engine, TEXT[:600], reused=599)


def test_reuse_is_needed_for_the_result(engine: Engine) -> None:
    """The comparison can fail: with keys of another text the log probabilities are far off."""
    engine.generate(TEXT[:100], NEW)
    (entry,) = engine.prefixes._entries
    entry.ids[:] = np.array(TEXT[200 : 200 + len(entry.ids)])
    turn = TEXT[200 : 200 + len(entry.ids)] + TEXT[400:405]
    wrong, right = engine.generate(turn, NEW), fresh(engine, turn)
    assert wrong.reused_tokens > 0
    assert abs(wrong.logprobs[0].logprob - right.logprobs[0].logprob) > BF16_STEP


def test_the_same_prompt_again_computes_one_token(engine: Engine) -> None:
    engine.generate(TEXT[:200], NEW)
    assert_same(engine, TEXT[:200], reused=199)


def test_two_conversations_share_their_beginning(engine: Engine) -> None:
    engine.generate(TEXT[:200], NEW)
    one, two = TEXT[:200] + TEXT[300:340], TEXT[:200] + TEXT[400:420]
    assert_same(engine, one, reused=200)
    assert_same(engine, two, reused=200)
    assert_same(engine, one + TEXT[500:510], reused=240)


def test_a_trimmed_window_is_recomputed_with_a_reason(engine: Engine) -> None:
    engine.generate(TEXT[:600], NEW)
    (entry,) = engine.prefixes._entries
    before = prefix.size_bytes(entry.cache)
    prefix.trim(entry.cache)
    assert prefix.size_bytes(entry.cache) < 0.6 * before
    near = TEXT[: 600 - prefix.SLACK + 10]
    assert_same(engine, near, reused=len(near) - 1)  # within the slack
    result = assert_same(engine, TEXT[:300], reused=0)
    assert "window of 128 tokens has moved on" in result.reuse_note


def test_a_trimmed_cache_goes_on(engine: Engine) -> None:
    result = engine.generate(TEXT[:600], NEW)
    prefix.trim(engine.prefixes._entries[0].cache)
    assert_same(engine, TEXT[:600] + result.ids + TEXT[800:820], reused=605)


def test_every_kept_conversation_goes_on(engine: Engine) -> None:
    firsts = [engine.generate(TEXT[start : start + 20 + start // 10], NEW) for start in (0, 100, 200)]
    for start, first in zip((0, 100, 200), firsts, strict=True):
        turn = TEXT[start : start + 20 + start // 10] + first.ids + TEXT[500:503]
        assert engine.generate(turn, NEW).reused_tokens == len(turn) - 4


def test_the_budget_holds(engine: Engine) -> None:
    engine.prefixes.budget_bytes = 1 << 20  # some 680 tokens of 1.5 kB
    for start in (0, 100, 200, 300):
        engine.generate(TEXT[start : start + 300], NEW)
        assert 0 < engine.prefixes.bytes <= engine.prefixes.budget_bytes
    assert 1 < len(engine.prefixes) < 4
    engine.prefixes.budget_bytes = 0
    engine.prefixes.clear()
    engine.generate(TEXT[:50], NEW)
    assert len(engine.prefixes) == 0


def test_what_cannot_be_cut_says_so() -> None:
    from transformers import StaticCache
    from transformers.models.gemma3 import Gemma3TextConfig

    cache = StaticCache(config=Gemma3TextConfig(num_hidden_layers=2, head_dim=8), max_cache_len=16)
    states = torch.zeros(1, 4, 3, 8)
    cache.update(states, states, 0)
    assert "cannot be cut" in prefix.cut(cache, 1)


def test_common_length() -> None:
    a = np.array([1, 2, 3])
    assert prefix.common_length(a, np.array([1, 2, 3, 4])) == 3
    assert prefix.common_length(a, np.array([1, 9, 3])) == 1
    assert prefix.common_length(a, np.array([], np.int64)) == 0


def test_one_common_token_is_not_worth_a_graph(engine: Engine) -> None:
    """Every prompt begins with the beginning-of-text token; torch compiles a cache of one row apart, for seconds."""
    ids = models.sample_ids(12)[0].tolist()
    engine.generate(ids, Settings(4))
    other = engine.generate([ids[0], *ids[:5:-1]], Settings(4))
    assert other.reused_tokens == other.compiled == 0
    assert engine.generate([*ids[:2], *ids[:5:-1]], Settings(4)).reused_tokens == 2
