"""Drafts for speculative decoding: what followed the last tokens the last time they occurred.

A draft is checked by one call of the model over all its tokens, which reads the weights once. Whether that pays is
decided from two measurements, so that text without repetitions costs nearly nothing:

- how often a draft would have been right is learned on every token, whether or not a draft was checked;
- how long calls with M tokens take is learned from the calls themselves.

Estimates err, so wrong drafts also have a budget (`Credit`): a small share of all calls, and what right ones gained.
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_DRAFT = 7
"""M = 8 tokens in one call at most: the kernels' small-M forms go so far."""

NGRAMS = (4, 3, 2)
"""Lengths of the contexts that are looked up, longest first; one token alone is wrong too often to be worth a call."""

MARGIN = 1.2
"""A draft must promise 20 % more tokens per second: rates and costs are estimates."""

# Pessimistic: learning is free, a wrong draft is not (fresh text at 0.88x with 0.5 hits in 1 trial).
PRIOR_HITS, PRIOR_TRIALS = 0.0, 2.0
MEMORY = 32.0
"""Trials remembered per context length: older ones fade, so that a change of the text shows within a few lines."""

LOSS = 0.02
"""Of all calls: what wrong drafts may cost. Fresh text keeps 0.95 of its speed, the bookkeeping included."""

MOST_CREDIT = 8.0
"""Calls; gains beyond are not saved up, or text that turns fresh would pay for them long after."""

FADE = 16
"""Tokens: what is done for each of them costs a small model 1 % of its time."""

PRIOR_COST = 0.12
"""Of a call, per further token, until measured."""


class Drafter:
    """Prompt lookup for one sequence.

    `extend` adds tokens, `propose` returns the draft to check next (perhaps none), `took` reports a call's time.
    """

    def __init__(self, max_draft: int = MAX_DRAFT, costs: Costs | None = None) -> None:
        self.max_draft = max_draft
        self.costs = costs if costs is not None else Costs()
        self._ids: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # n-gram -> where it ended last, before the present one
        self._odds = {n: Odds(PRIOR_HITS, PRIOR_TRIALS, MEMORY) for n in NGRAMS}
        self._found = (0, 0)  # length of the context found at the end, and where its continuation starts

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            size, start = self._found
            if size:
                self._odds[size].learn(self._ids[start] == token)
            self._ids.append(token)
            self._found = self._look_up()

    def _look_up(self) -> tuple[int, int]:
        """The longest context that occurred before; remembers where the present ones end."""
        end = len(self._ids)
        found = (0, 0)
        for size in NGRAMS:
            if end < size:
                continue
            key = tuple(self._ids[-size:])
            before = self._ends.get(key)
            if before is not None and not found[0]:
                found = (size, before)
            self._ends[key] = end
        return found

    def rate(self, size: int) -> float:
        """Estimated chance that the next token is the one that followed a context of this length."""
        return self._odds[size].rate

    def propose(self, room: int) -> list[int]:
        """At most `room` tokens; none if no draft promises `MARGIN` more tokens per second than going without."""
        size, start = self._found
        if not size:
            return []
        best = best_length(self.rate(size), self.costs, min(self.max_draft, room), MARGIN, self.costs.credit)
        return self._continuation(start, best)

    def _continuation(self, start: int, count: int) -> list[int]:
        """`count` tokens from `start` on; past the end it repeats what it has (a loop goes on as a loop)."""
        period = len(self._ids) - start
        return [self._ids[start + i % period] for i in range(count)]

    def took(self, tokens: int, seconds: float, accepted: int) -> None:
        """A call with `tokens` tokens, of which the first was known and `accepted` were drafted right."""
        self.costs.took(tokens, seconds)
        self.costs.credit.earn(accepted + 1 - self.costs.relative(tokens) if tokens > 1 else 0.0)

    def finish(self) -> None:
        """The sequence is over; nothing of it is kept."""


class Odds:
    """How often something was right lately; `memory` trials are remembered, older ones fade."""

    def __init__(self, hits: float, trials: float, memory: float) -> None:
        self._hits, self._trials, self._fade = hits, trials, 1 - 1 / memory

    @property
    def rate(self) -> float:
        return self._hits / self._trials

    def learn(self, hit: bool) -> None:
        self._hits, self._trials = self._hits * self._fade + hit, self._trials * self._fade + 1


def best_length(rate: float, costs: Costs, most: int, margin: float, credit: Credit, each: float = 0.0) -> int:
    """The length of a draft with most tokens per second, its tokens right at this rate if those before them were.

    0 where none promises `margin` times those without, or what it may lose is more than there is credit for. each: of
    drafting a token, in calls of the model.
    """
    if rate < 1 and 1 <= margin * (1 + each) * (1 - rate):  # not even if checking a draft of any length were free
        return 0
    best, gain = 0, margin
    expected = chance = 1.0
    for count in range(1, most + 1):
        chance *= rate
        expected += chance
        cost = costs.relative(count + 1) + count * each
        if expected / cost > gain and credit.allows(cost - 1):
            best, gain = count, expected / cost
    return best


class Credit:
    """What drafts may lose, in calls of the model with one token: `LOSS` of each call, and what drafts gained."""

    def __init__(self, calls: float = 1.0) -> None:
        self._calls = calls

    def allows(self, loss: float) -> bool:
        return loss <= self._calls

    def earn(self, gain: float) -> None:
        """A call is over, whose tokens would have taken `gain` calls more without a draft; negative: less."""
        self._calls = min(self._calls + LOSS + gain, MOST_CREDIT)


class Costs:
    """Measured time of one call with M tokens, relative to M = 1. Shared by all requests of a model.

    credit: of drafts from repeated text.
    """

    def __init__(self) -> None:
        self.credit = Credit()
        self._seconds: dict[int, float] = {}
        self._singles = 0  # calls with one token since what was measured last faded
        self._seen: set[bool] = set()

    def took(self, tokens: int, seconds: float) -> None:
        """A call with `tokens` tokens. The fastest counts; the first of either kind does not, as it may compile.

        What was measured once, perhaps in a stall, fades to the prior by 1 % per later token (all `FADE` at once), and
        so is tried again.
        """
        if tokens > MAX_DRAFT + 1:
            return
        if (tokens > 1) not in self._seen:
            self._seen.add(tokens > 1)
            return
        known = self._seconds.get(tokens, seconds)
        self._seconds[tokens] = seconds if seconds < known else known + 0.05 * (min(seconds, 2 * known) - known)
        self._singles += tokens == 1
        if self._singles == FADE:
            self._singles = 0
            for other in self._seconds.keys() - {1}:
                target = self._prior(other) * self._seconds[1]
                self._seconds[other] += 0.01 * FADE * min(target - self._seconds[other], 0.0)

    def seconds(self, tokens: int) -> float | None:
        """Of a call with so many tokens, if measured."""
        return self._seconds.get(tokens)

    def relative(self, tokens: int) -> float:
        """Cost of M tokens over that of one: measured, else by the slope of the nearest measured M, else the prior."""
        one = self._seconds.get(1)
        near = min(self._seconds.keys() - {1}, key=lambda m: abs(m - tokens), default=None)
        if one is None or near is None:
            return self._prior(tokens)
        slope = max(self._seconds[near] / one - 1, 0.0) / (near - 1)
        return 1 + slope * (tokens - 1)

    @staticmethod
    def _prior(tokens: int) -> float:
        return 1 + PRIOR_COST * (tokens - 1)
