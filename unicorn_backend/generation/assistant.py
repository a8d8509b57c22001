"""Drafts for speculative decoding from a smaller model with the same vocabulary.

Drafting with a model is not free, as looking text up is: a draft of `k` tokens costs `k` calls of the assistant. Both
models' calls are timed, how often a drafted token is right is counted, and the length that promises most tokens per
second is drafted; none if that is hardly more than without. Then the assistant is only tried now and then, for a small
share of the time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from unicorn_backend import models
from unicorn_backend.errors import OptionError
from unicorn_backend.generation.drafting import MAX_DRAFT, MOST_CREDIT, Costs, Credit, Drafter, Odds, best_length
from unicorn_backend.generation.prefix import PrefixStore, cut
from unicorn_backend.integration.transformers_hooks import cache_argument

MARGIN = 1.1
"""A draft must promise 10 % more tokens per second."""

MEMORY = 16.0
"""Drafted tokens that the rate is taken over: older ones fade."""

PRIOR_HITS, PRIOR_TRIALS = 3.0, 4.0
"""Who names an assistant expects it to be right mostly; a few wrong tokens correct that."""

PRIOR_COST = 0.25
"""Of the model's call, per call of the assistant, until measured on drafts of `TRIAL` tokens."""

TRIAL = 2
TRIALS_SHARE = 0.01
"""Of the time, at most, goes to trials of an assistant that does not pay."""


class Assistant:
    """A compiled assistant model, shared by all requests of an engine; it keeps conversations as the engine does."""

    def __init__(
        self,
        name: str | Path,
        options: Mapping[str, Any] | None,
        tokenizer: Any,
        *,
        model: Any = None,
        prefix_bytes: int = 1 << 30,
    ) -> None:
        """tokenizer: of the model that checks the drafts. Raises OptionError if the assistant's is another one."""
        if models.load_tokenizer(name).get_vocab() != tokenizer.get_vocab():
            raise OptionError(
                f"assistant: {name} has another vocabulary than the model; take a smaller model of the same family"
            )
        self.name = str(name)
        original = models.load(name) if model is None else model
        self.model: Any = torch.compile(original, backend="unicorn", options=dict(options or {}))
        self.prefixes = PrefixStore(self.model, prefix_bytes)
        self.experience = Experience()

    def warm_up(self, ids: Sequence[int]) -> None:
        """Quantize and compile now; `ids` are any few tokens."""
        drafter = AssistedDrafter(self, Drafter(max_draft=0), max(ids) + 1)
        for tokens in (ids, ids[:2]):
            drafter.extend(tokens)
            drafter.draft(2)
        self.experience = Experience()


class Experience:
    """What was learned of an assistant: what its drafts cost, how often they are right, and what trials took."""

    def __init__(self) -> None:
        self.costs = Costs()  # of one drafted token
        self.odds = Odds(PRIOR_HITS, PRIOR_TRIALS, MEMORY)  # that a drafted token is right, if those before it were
        self.credit = Credit(MOST_CREDIT)  # once per assistant, to find out what it is worth
        self._decoding_s = self._trying_s = 0.0

    def spent(self, seconds: float, trying: bool) -> None:
        """Time of a draft or of checking it; trying: it was not expected to pay."""
        self._decoding_s += seconds
        self._trying_s += seconds * trying

    def may_be_tried(self) -> bool:
        return self._trying_s <= TRIALS_SHARE * self._decoding_s


class AssistedDrafter:
    """Drafts of one sequence: what text repeats (`Drafter`), else what the assistant says. Same methods as `Drafter`.

    vocab_size: of the model; an assistant's table may be padded to more rows.
    """

    def __init__(self, assistant: Assistant, lookup: Drafter, vocab_size: int) -> None:
        self._assistant, self._lookup, self._vocab_size = assistant, lookup, vocab_size
        self._ids: list[int] = []
        self._rows: list[int] = []  # tokens whose rows the assistant's cache holds
        self._cache: Any = None
        self._pending: list[int] = []  # of the assistant's draft, not decided yet
        self._trying = False  # the draft is a trial
        self._drafted = 0.0  # what the draft cost, in calls of the model

    def extend(self, tokens: Sequence[int]) -> None:
        self._lookup.extend(tokens)
        self._ids += tokens
        for token in tokens:
            if not self._pending:
                break
            hit = self._pending[0] == token
            self._assistant.experience.odds.learn(hit)
            self._pending = self._pending[1:] if hit else []

    def propose(self, room: int) -> list[int]:
        """At most `room` tokens; none where neither a repetition nor the assistant promises a gain."""
        self._pending = []
        if draft := self._lookup.propose(room):
            return draft
        count = self._count(min(room, MAX_DRAFT))
        if count:
            start = time.perf_counter()
            self._pending = self.draft(count)
            self._assistant.experience.spent(time.perf_counter() - start, self._trying)
            self._drafted = count * self._cost()
        return list(self._pending)

    def took(self, tokens: int, seconds: float, accepted: int) -> None:
        experience, costs = self._assistant.experience, self._lookup.costs
        if self._drafted:
            costs.took(tokens, seconds)
            experience.credit.earn(accepted + 1 - costs.relative(tokens) - self._drafted)
        else:
            self._lookup.took(tokens, seconds, accepted)
        experience.spent(seconds, self._trying)
        self._trying, self._drafted = False, 0.0

    def finish(self) -> None:
        """The sequence is over: keep the assistant's keys and values for the next one."""
        if self._cache is not None:
            self._assistant.prefixes.put(self._rows, self._cache)

    def _count(self, room: int) -> int:
        """How many tokens to draft."""
        each = self._assistant.experience.costs.seconds(1)
        if self._lookup.costs.seconds(1) is None or room < 1:
            return 0
        cost = self._cost()
        if best := self._best(self._assistant.experience.odds.rate, cost, room):
            return best if each is not None else min(best, TRIAL)
        self._trying = self._assistant.experience.may_be_tried() and self._best(1.0, cost, room) > 0
        return min(TRIAL, room) if self._trying else 0

    def _cost(self) -> float:
        """Of drafting a token, in calls of the model."""
        one, each = self._lookup.costs.seconds(1), self._assistant.experience.costs.seconds(1)
        return each / one if one is not None and each is not None else PRIOR_COST

    def _best(self, rate: float, cost: float, room: int) -> int:
        """The length with most tokens per second at this rate of right ones; 0 if none gains `MARGIN`."""
        return best_length(rate, self._lookup.costs, room, MARGIN, self._assistant.experience.credit, cost)

    @torch.no_grad()
    def draft(self, count: int) -> list[int]:
        """What the assistant says next, greedily."""
        self._follow()
        new = len(self._ids) - len(self._rows)
        start = time.perf_counter()
        draft: list[int] = []
        for _ in range(count):
            tokens = (self._ids + draft)[len(self._rows) :]
            positions = torch.arange(len(self._rows), len(self._rows) + len(tokens))[None]
            logits = self._assistant.model(
                torch.tensor([tokens]),
                position_ids=positions,
                **{cache_argument(): self._cache},
                use_cache=True,
                logits_to_keep=1,
                return_dict=True,
            ).logits[0, -1]
            self._rows += tokens
            draft.append(int(logits[: self._vocab_size].argmax()))
        if new <= MAX_DRAFT + 1:  # not the prompt, nor what was said in a pause
            self._assistant.experience.costs.took(1, (time.perf_counter() - start) / count)
        return draft

    def _follow(self) -> None:
        """Take the rows of what turned out otherwise from the assistant's cache, which this makes if there is none."""
        if self._cache is not None:
            agree = next((i for i, (a, b) in enumerate(zip(self._rows, self._ids, strict=False)) if a != b), None)
            keep = min(len(self._rows), len(self._ids) - 1) if agree is None else agree
            if not cut(self._cache, len(self._rows) - keep):
                del self._rows[keep:]
                return
        taken = self._assistant.prefixes.take(self._ids)
        self._cache, self._rows = taken.cache, self._ids[: taken.reused]
