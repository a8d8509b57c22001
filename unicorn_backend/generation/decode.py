"""The decoding loop behind run, chat and serve, given to transformers as `generate(custom_generate=...)`.

transformers prepares everything (lengths, logits processors, stopping criteria); this loop runs the model. Against
transformers' own it can be told to stop between two tokens, samples from a generator of its own, so that requests do
not disturb each other, and checks several drafted tokens in one call of the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unicorn_backend.generation.assistant import AssistedDrafter
from unicorn_backend.generation.drafting import Drafter
from unicorn_backend.generation.prefix import cut

OnToken = Callable[[int, Tensor], bool]
"""Called with each new token and its logits [V] (of the model, unprocessed); True stops."""


@dataclass
class Loop:
    """One generation: its inputs, and afterwards what it took.

    on_token: called with every token; returning True stops the loop.
    generator: source of samples, None for the process-wide one.
    drafter: proposes tokens to check, None for one token per call.
    """

    on_token: OnToken
    generator: torch.Generator | None = None
    drafter: Drafter | AssistedDrafter | None = None
    start: float = field(default_factory=time.perf_counter)
    token_times: list[float] = field(default_factory=list)  # seconds after `start`
    calls: int = 0  # of the model, the prompt's included
    drafted: int = 0
    accepted: int = 0

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,  # [1, T]
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor:
        """Returns all ids [1, T + new]. Batch 1 only."""
        cache = model_kwargs["past_key_values"]
        model_kwargs = {k: v for k, v in model_kwargs.items() if k not in ("position_ids", "logits_to_keep")}
        ids = torch.empty(1, generation_config.max_length, dtype=torch.long)  # [1, max]
        length = input_ids.shape[1]
        ids[:, :length] = input_ids
        if self.drafter is not None:
            self.drafter.extend(input_ids[0].tolist())
        done = False
        while not done:
            known = cache.get_seq_length()
            room = generation_config.max_length - length - 1
            draft = self.drafter.propose(room) if self.drafter is not None and known == length - 1 else []
            begin = time.perf_counter()
            if draft:
                ids[0, length : length + len(draft)] = torch.tensor(draft)
            logits = self._call(model, ids[:, : length + len(draft)], known, len(draft), model_kwargs)
            accepted = 0
            for position in range(len(draft) + 1):
                row = logits[position]  # [V]
                token = self._choose(logits_processor(ids[:, :length], row[None]), generation_config.do_sample)
                hit = position < len(draft) and token == draft[position]
                ids[0, length] = token
                length += 1
                if self.drafter is not None:
                    self.drafter.extend([token])
                self.token_times.append(time.perf_counter() - self.start)
                done = self.on_token(token, row) or bool(stopping_criteria(ids[:, :length], None).all())
                if done or not hit:
                    break
                accepted += 1
            self.drafted += len(draft)
            self.accepted += accepted
            cut(cache, len(draft) - accepted)
            if self.drafter is not None and self.calls > 1:
                self.drafter.took(len(draft) + 1, time.perf_counter() - begin)
        if self.drafter is not None:
            self.drafter.finish()
        return ids[:, :length]

    def _call(self, model: Any, ids: Tensor, known: int, drafted: int, model_kwargs: dict[str, Any]) -> Tensor:
        """Logits [drafted + 1, V] of the last positions of ids [1, T], of which the cache has the first `known`."""
        new = ids.shape[1] - known
        inputs = model.prepare_inputs_for_generation(
            ids,
            next_sequence_length=new,
            is_first_iteration=self.calls == 0,
            position_ids=torch.arange(known, known + new)[None],
            logits_to_keep=drafted + 1,
            **model_kwargs,
        )
        self.calls += 1
        return model(**inputs, return_dict=True).logits[0].float()  # type: ignore[no-any-return]

    def _choose(self, scores: Tensor, sample: bool) -> int:
        """One token of processed scores [1, V]."""
        if not sample:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self.generator))
