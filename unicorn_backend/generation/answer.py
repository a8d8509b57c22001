"""A request while it runs: tokens to text, when to stop, and the result."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence as Items
from typing import Any

import torch
from torch import Tensor

from unicorn_backend.generation.decode import Sequence
from unicorn_backend.generation.request import OnText, Result, Settings, TokenLogprob
from unicorn_backend.generation.text import TextStream
from unicorn_backend.integration.prepare import plans_of


class Answer:
    """One request of an engine. `begin` it, step its `sequence` until `done`, then take the `result`.

    cancelled: who sets it ends the answer before the next call of the model.
    """

    def __init__(
        self,
        engine: Any,
        ids: Items[int],
        settings: Settings,
        on_text: OnText | None = None,
        cancelled: threading.Event | None = None,
        chunk: int = 0,
    ) -> None:
        """chunk: most tokens of the prompt in one call. Raises RequestError if the prompt does not fit."""
        engine.check(ids)
        self._engine, self._settings, self._on_text, self._cancelled = engine, settings, on_text, cancelled
        self._prompt = len(ids)
        self._reused, self._note = 0, ""
        self._stream = TextStream(engine.tokenizer, settings.stop)
        self._ends = frozenset() if settings.ignore_eos else engine.end_tokens().union(settings.stop_tokens)
        self._texts: list[str] = []
        self._new: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._said = 0  # log probabilities that were handed on
        self._stopped = ""
        self._compiling = _Compiling(engine.original)
        seed = settings.seed
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        drafter = engine.drafter(settings) if settings.speculate else None
        sees_logits = settings.top_logprobs is not None
        self.sequence = Sequence(self._on_token, generator, drafter, chunk, sees_logits)
        limit = min(settings.max_new_tokens, engine.context - len(ids))
        config = engine.generation_config(settings, limit)
        engine.model.generate(torch.tensor([list(ids)]), custom_generate=self.sequence, generation_config=config)

    def begin(self) -> None:
        """Take what is known of the prompt."""
        taken = self._engine.prefixes.take(self.sequence.ids)
        self.sequence.cache, self._reused, self._note = taken.cache, taken.reused, taken.note

    @property
    def done(self) -> bool:
        if not self.sequence.done and self._cancelled is not None and self._cancelled.is_set():
            self._stopped = "cancelled"
        return self.sequence.done or bool(self._stopped)

    def _on_token(self, token: int, logits: Tensor) -> bool:
        self._new.append(token)
        self._compiling.look(self.sequence.token_times)
        if self._settings.top_logprobs is not None:
            self._logprobs.append(_logprob(logits, token, self._settings.top_logprobs))
        piece = self._stream.add(token) if token not in self._ends else ""
        if piece and self._say(piece):
            self._stopped = "cancelled"
        if self._cancelled is not None and self._cancelled.is_set():
            self._stopped = "cancelled"
        elif self._stream.stopped or token in self._ends:
            self._stopped = "stop"
        return bool(self._stopped)

    def _say(self, piece: str) -> bool:
        """Hand a piece of text on. True if whoever gets it wants no more."""
        self._texts.append(piece)
        enough = self._on_text is not None and self._on_text(piece, self._logprobs[self._said :])
        self._said = len(self._logprobs)
        return bool(enough)

    def result(self) -> Result:
        """What came out; its keys and values are kept for later requests."""
        sequence = self.sequence
        seconds = time.perf_counter() - sequence.start
        if sequence.drafter is not None:
            sequence.drafter.finish()
        if sequence.cache is not None:
            self._engine.prefixes.put(sequence.ids, sequence.cache)
        if (rest := self._stream.flush()) and self._stopped != "cancelled":
            self._say(rest)
        return Result(
            ids=self._new,
            text="".join(self._texts),
            finish=self._stopped or "length",
            prompt_tokens=self._prompt,
            reused_tokens=self._reused,
            reuse_note=self._note,
            first_token_s=sequence.token_times[0] if sequence.token_times else seconds,
            seconds=seconds,
            calls=sequence.calls,
            drafted=sequence.drafted,
            accepted=sequence.accepted,
            compiled=self._compiling.graphs,
            compile_calls=self._compiling.calls,
            compile_s=self._compiling.seconds,
            shared_calls=sequence.shared_calls,
            logprobs=self._logprobs,
        )


class _Compiling:
    """Graphs compiled since it was made; of the calls after the first in which some were, the number and seconds."""

    def __init__(self, model: Any) -> None:
        self._model, self._before = model, len(plans_of(model))
        self.graphs, self.calls, self.seconds = 0, 0, 0.0

    def look(self, token_times: Items[float]) -> None:
        """Called with each new token."""
        graphs = len(plans_of(self._model)) - self._before
        if graphs != self.graphs and len(token_times) > 1:
            self.calls += 1
            self.seconds += token_times[-1] - token_times[-2]
        self.graphs = graphs


def _logprob(logits: Tensor, token: int, count: int) -> TokenLogprob:
    values = logits.log_softmax(-1)
    top = values.topk(count) if count else None
    pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)) if top is not None else ()
    return TokenLogprob(token, float(values[token]), pairs)
