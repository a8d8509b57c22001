"""One generation, a call of the model at a time.

transformers prepares it (lengths, logits processors, stopping criteria): a `Sequence` is given to `generate` as
`custom_generate`, and only remembers what it got. `step` then runs the model. Against transformers' own loop it can
stop between two tokens, samples from a generator of its own, so that requests do not disturb each other, checks
several drafted tokens in one call of the model, and can share its calls with other sequences (`batch.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unicorn_backend.generation.assistant import AssistedDrafter
from unicorn_backend.generation.choose import Sampler, best_of, greedy
from unicorn_backend.generation.drafting import Drafter
from unicorn_backend.generation.prefix import cut
from unicorn_backend.integration.screening import one_call
from unicorn_backend.integration.transformers_hooks import cache_argument

OnToken = Callable[[int, Tensor], bool]
"""Called with each new token and its logits [V] (of the model, unprocessed; see `sees_logits`); True stops."""


@dataclass(eq=False)
class Sequence:
    """One generation: its inputs, its state, and what it took.

    on_token: called with every token; returning True stops.
    generator: source of samples, None for the process-wide one.
    drafter: proposes tokens to check, None for one token per call.
    chunk: most tokens of a prompt in one call, 0 for all.
    sees_logits: `on_token` looks at them; else only those that a token is chosen from need be right.
    cache: holds some of the prompt's first tokens, or none; to be set before the first step.
    """

    on_token: OnToken
    generator: torch.Generator | None = None
    drafter: Drafter | AssistedDrafter | None = None
    chunk: int = 0
    sees_logits: bool = True
    cache: Any = None
    start: float = field(default_factory=time.perf_counter)
    token_times: list[float] = field(default_factory=list)  # seconds after `start`
    calls: int = 0  # of the model, the prompt's included
    shared_calls: float = 0.0  # the same, a call for B sequences counted as 1 / B
    drafted: int = 0
    accepted: int = 0
    done: bool = False

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,  # [1, T]
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor:
        """What transformers prepared. Computes nothing. Batch 1 only."""
        self.model, self._processor, self._criteria = model, logits_processor, stopping_criteria
        self._sampler, self.most = None, generation_config.max_length
        if generation_config.do_sample:
            self._sampler = Sampler(logits_processor)
            self._processor = type(logits_processor)(self._sampler.before)
        self._best = 0 if self.sees_logits else best_of(logits_processor, self._sampler)
        given = ("position_ids", "logits_to_keep", "attention_mask", cache_argument())
        self.model_kwargs = {k: v for k, v in model_kwargs.items() if k not in given}
        self.length = input_ids.shape[1]
        self._ids = torch.empty(1, self.most, dtype=torch.long)  # [1, max]
        self._ids[:, : self.length] = input_ids
        if self.drafter is not None:
            self.drafter.extend(input_ids[0].tolist())
        return input_ids

    @property
    def ids(self) -> list[int]:
        """The prompt and what follows it so far."""
        return self._ids[0, : self.length].tolist()

    @property
    def last(self) -> int:
        return int(self._ids[0, self.length - 1])

    @property
    def decoding(self) -> bool:
        """True once the cache has all tokens but the last."""
        return bool(0 < self.cache.get_seq_length() == self.length - 1)

    def step(self) -> None:
        """One call of the model: a part of the prompt, or the next token, or several of them that were drafted."""
        known = self.cache.get_seq_length()
        new = self.length - known
        if self.chunk and new > self.chunk:
            self._call(known, self.chunk, 1)
            return
        draft = self.drafter.propose(self.most - self.length - 1) if self.drafter is not None and new == 1 else []
        begin = time.perf_counter()
        if draft:
            self._ids[0, self.length : self.length + len(draft)] = torch.tensor(draft)
        logits = self._call(known, new + len(draft), len(draft) + 1)
        accepted = 0
        while self.take(logits[accepted]) and accepted < len(draft) and self.last == draft[accepted]:
            accepted += 1
        self.drafted += len(draft)
        self.accepted += accepted
        cut(self.cache, len(draft) - accepted)
        if self.drafter is not None and self.calls > 1:
            self.drafter.took(len(draft) + 1, time.perf_counter() - begin, accepted)

    def take(self, logits: Tensor) -> bool:
        """Choose the next token from its logits [V]. Returns False if it is the last one."""
        ids = self._ids[:, : self.length]
        scores = self._processor(ids, logits[None])  # [1, V]
        token = int(greedy(scores) if self._sampler is None else self._sampler(ids, scores, self.generator))
        self._ids[0, self.length] = token
        self.length += 1
        if self.drafter is not None:
            self.drafter.extend([token])
        self.token_times.append(time.perf_counter() - self.start)
        ended = self._criteria(self._ids[:, : self.length], None)
        self.done = self.on_token(token, logits) or bool(ended.all())
        return not self.done

    def _call(self, known: int, new: int, keep: int) -> Tensor:
        """Logits [keep, V] of the last of `new` tokens after the `known` ones that the cache has."""
        inputs = self.model.prepare_inputs_for_generation(
            self._ids[:, : known + new],
            next_sequence_length=new,
            is_first_iteration=self.calls == 0,
            position_ids=torch.arange(known, known + new)[None],
            logits_to_keep=keep,
            **{cache_argument(): self.cache},
            **self.model_kwargs,
        )
        self.called(1)
        with one_call(self.model, self._best):
            return self.model(**inputs, return_dict=True).logits[0].float()  # type: ignore[no-any-return]

    def called(self, sequences: int) -> None:
        """Count a call of the model that so many sequences share."""
        self.calls += 1
        self.shared_calls += 1 / sequences
