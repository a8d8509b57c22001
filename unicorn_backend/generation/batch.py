"""Several answers decoded together: one call of the model reads the weights once and gives each its next token.

Answers come and go between two calls. The prompt of a new one is computed alone, a part per step, so that the others
go on; then its keys and values become a row of the batch. Rows end in the same column: what a sequence is shorter than
the longest stands as zeros before its first token, hidden by the attention mask. The attention kernel begins each row
at its first visible key, the others compute rows apart, and each row samples from its own logits with its own
generator: an answer does not depend on what is computed beside it. One alone is decoded as ever, drafts included.
"""

from __future__ import annotations

import functools
import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unicorn_backend import table
from unicorn_backend.generation import prefix
from unicorn_backend.generation.answer import Answer
from unicorn_backend.generation.request import OnText, Result, Settings
from unicorn_backend.integration.transformers_hooks import cache_argument

log = logging.getLogger(__name__)

ROWS = 8
"""Answers decoded together by default: up to 8 tokens cost the kernels little more than the weights' bytes."""

CHUNK = 256
"""Tokens of a prompt between two steps of the others: enough that its arithmetic takes longer than the weights."""

LEAST_COLUMNS = 2
"""Of a shared cache: torch compiles a cache of one row apart, which takes seconds."""

Outcome = tuple[Any, Result | Exception]
"""A finished request: the key it was added with, and what came of it."""


@dataclass(eq=False)
class _Row:
    """An answer that is decoded. `held`: rows of each layer of its cache when it had `known` tokens."""

    key: Any
    answer: Answer
    known: int = 0
    held: list[int] = field(default_factory=list)

    def rows(self, layer: int) -> int:
        """Rows that this layer holds of the sequence now."""
        return self.held[layer] + self.answer.sequence.length - 1 - self.known


class Batch:
    """The running answers of an engine. `add` them, and `step` until none is left; one thread does both.

    rows: decoded together at most. memory_bytes: of their keys and values; who would exceed it waits.
    on_step: called with the number of answers that a call of the model gave a token.
    """

    def __init__(
        self,
        engine: Any,
        rows: int = ROWS,
        memory_bytes: int | None = None,
        on_step: Callable[[int], None] = lambda rows: None,
    ) -> None:
        self._engine, self._most, self._on_step = engine, rows, on_step
        physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self._memory_bytes = physical // 4 if memory_bytes is None else memory_bytes
        self._prompts: deque[_Row] = deque()  # in the order of arrival
        self._rows: list[_Row] = []
        self._shared: Any = None  # the cache of all rows, if there are several
        self._outcomes: list[Outcome] = []
        self._said: set[str] = set()

    def __len__(self) -> int:
        """Answers that are not finished."""
        return len(self._prompts) + len(self._rows) + len(self._outcomes)

    @property
    def has_room(self) -> bool:
        return len(self) < self._most

    def add(
        self,
        key: Any,
        ids: Sequence[int],
        settings: Settings,
        on_text: OnText | None = None,
        cancelled: Any = None,
    ) -> None:
        """Take a request; `key` stands for it in what `step` returns."""
        with self._engine.lock, torch.no_grad():
            chunk = CHUNK if self._most > 1 else 0

            def start() -> None:
                self._prompts.append(_Row(key, Answer(self._engine, ids, settings, on_text, cancelled, chunk)))

            if error := _error_of(start):
                self._outcomes.append((key, error))

    def step(self) -> list[Outcome]:
        """A part of one prompt, and a token for each answer that has its prompt. Returns what has ended."""
        with self._engine.lock, torch.no_grad():
            self._end()
            if self._prompts:
                self._go_on_with(self._prompts[0])
            if self._rows:
                self._decode()
            self._end()
        ended, self._outcomes = self._outcomes, []
        return ended

    # ---- prompts ------------------------------------------------------------------------------------------------

    def _go_on_with(self, row: _Row) -> None:
        """Compute a part of a prompt; at its end the row joins the others, if it may."""
        sequence = row.answer.sequence
        if sequence.cache is None:  # not before: now all prompts ahead of it are known
            row.answer.begin()
        if not sequence.decoding:
            if error := _error_of(sequence.step):
                self._prompts.remove(row)
                self._outcomes.append((row.key, error))
                return
            if sequence.decoding:  # requests that wait may begin alike
                self._engine.prefixes.put(sequence.ids, prefix.fork(sequence.cache))
        if sequence.decoding and not row.answer.done and self._may_join(row):
            self._prompts.remove(row)
            self._regroup([*self._rows, row])

    def _may_join(self, row: _Row) -> bool:
        reason = self._why_alone(row) if self._rows else ""
        if reason and reason not in self._said:
            log.warning("a request waits until it can run alone: %s", reason)
            self._said.add(reason)
        return not reason

    def _why_alone(self, row: _Row) -> str:
        cache = row.answer.sequence.cache
        kinds = {type(layer) for layer in cache.layers if layer.is_initialized}
        if foreign := kinds - set(prefix.growing_layers()):
            return f"its cache has {', '.join(sorted(kind.__name__ for kind in foreign))}, which cannot be put together"
        longest = max(other.answer.sequence.most for other in (*self._rows, row))
        needed = (len(self._rows) + 1) * longest * prefix.size_bytes(cache) // cache.get_seq_length()
        if needed > self._memory_bytes:
            return f"keys and values would take more than {table.size(self._memory_bytes)} with those of the others"
        return ""

    # ---- decoding -----------------------------------------------------------------------------------------------

    def _decode(self) -> None:
        """The next token of every row."""
        self._on_step(len(self._rows))
        if self._shared is None:
            (row,) = self._rows
            if error := _error_of(row.answer.sequence.step):
                self._fail([row], error)
            return
        logits: list[Tensor] = []
        if error := _error_of(lambda: logits.extend(self._call())):
            self._fail(self._rows, error)
            return
        failed = []
        for row, own in zip(self._rows, logits, strict=True):
            if error := _error_of(functools.partial(row.answer.sequence.take, own)):
                failed.append((row, error))
        for row, error in failed:
            self._fail([row], error)

    def _call(self) -> Tensor:
        """Logits [B, V] of the next tokens."""
        sequences = [row.answer.sequence for row in self._rows]
        columns = self._shared.get_seq_length() + 1
        lengths = torch.tensor([[sequence.length] for sequence in sequences])  # [B, 1], the new token included
        inputs = sequences[0].model.prepare_inputs_for_generation(
            torch.tensor([[sequence.last] for sequence in sequences]),
            next_sequence_length=1,
            is_first_iteration=False,
            attention_mask=(torch.arange(columns) >= columns - lengths).long(),
            position_ids=lengths - 1,
            logits_to_keep=1,
            **{cache_argument(): self._shared},
            **sequences[0].model_kwargs,
        )
        for sequence in sequences:
            sequence.called(len(sequences))
        return sequences[0].model(**inputs, return_dict=True).logits[:, 0].float()  # type: ignore[no-any-return]

    # ---- coming and going ---------------------------------------------------------------------------------------

    def _end(self) -> None:
        """Take out what is finished or cancelled."""
        ended = [row for row in (*self._rows, *self._prompts) if row.answer.done]
        if not ended:
            return
        self._regroup([row for row in self._rows if row not in ended])
        self._prompts = deque(row for row in self._prompts if row not in ended)
        self._outcomes += [(row.key, _outcome(row.answer)) for row in ended]

    def _fail(self, rows: Sequence[_Row], error: Exception) -> None:
        """These answers end with an error; what they held is not kept."""
        rows = list(rows)
        self._outcomes += [(row.key, error) for row in rows]
        self._regroup([row for row in self._rows if row not in rows], give_back=False)

    def _regroup(self, rows: list[_Row], give_back: bool = True) -> None:
        """Decode these rows from now on. Who leaves, or is alone, gets a cache of its own again."""
        before, shared = self._rows, self._shared
        if rows == before:
            return
        parts = {id(row): _Part(shared, before.index(row)) for row in before if shared is not None and row in before}
        alone = [row for row in before if row not in rows] if give_back else []
        for row in (*alone, *(rows if len(rows) == 1 else ())):
            if id(row) in parts:
                parts[id(row)].give_back(row)
        self._rows = rows
        self._shared = _merged(rows, parts) if len(rows) > 1 else None


@dataclass(frozen=True)
class _Part:
    """Where a row's keys and values are in a shared cache."""

    cache: Any
    index: int

    def of(self, row: _Row, layer: int) -> list[Tensor]:
        shared, count = self.cache.layers[layer], row.rows(layer)
        return [t[self.index : self.index + 1, :, t.shape[2] - count :] for t in (shared.keys, shared.values)]

    def give_back(self, row: _Row) -> None:
        """The row's part of every layer into its own cache, copied: the others' memory is not kept for it."""
        for number, layer in enumerate(row.answer.sequence.cache.layers):
            if layer.is_initialized:
                layer.keys, layer.values = (t.clone() for t in self.of(row, number))
                if layer.is_sliding:
                    layer.cumulative_length = row.answer.sequence.length - 1


def _merged(rows: list[_Row], parts: dict[int, _Part]) -> Any:
    """One cache [B, H, S, D] of all rows: their `parts` of the one before, else their own caches, which are emptied."""
    for row in rows:
        if id(row) not in parts:
            layers = row.answer.sequence.cache.layers
            row.known = row.answer.sequence.length - 1
            row.held = [layer.keys.shape[2] if layer.is_initialized else 0 for layer in layers]
    columns = max(LEAST_COLUMNS, *(row.answer.sequence.length - 1 for row in rows))
    shared = prefix.fork(rows[0].answer.sequence.cache)
    for number, layer in enumerate(shared.layers):
        if not layer.is_initialized:  # it shares the keys of another layer
            continue
        count = columns
        if layer.is_sliding:
            layer.cumulative_length = columns
            count = max(min(columns, layer.sliding_window - 1), *(row.rows(number) for row in rows))
        tensors = []
        for row in rows:
            own = row.answer.sequence.cache.layers[number]
            tensors.append(parts[id(row)].of(row, number) if id(row) in parts else (own.keys, own.values))
            own.keys = own.values = None
        layer.keys, layer.values = (_stacked(each, count) for each in zip(*tensors, strict=True))
        for part in parts.values():  # not kept until the last layer is done
            part.cache.layers[number].keys = part.cache.layers[number].values = None
    return shared


def _stacked(tensors: Sequence[Tensor], rows: int) -> Tensor:
    """[B, H, rows, D] of tensors [1, H, S, D], zeros before the first row of those that have less."""
    first = tensors[0]
    out = first.new_zeros(len(tensors), first.shape[1], rows, first.shape[3])
    for place, tensor in zip(out, tensors, strict=True):
        place[:, rows - tensor.shape[2] :] = tensor[0]
    return torch.ops.unicorn.last_rows(out, rows)  # type: ignore[no-any-return]


def _outcome(answer: Answer) -> Result | Exception:
    results: list[Result] = []
    error = _error_of(lambda: results.append(answer.result()))
    return error or results[0]


def _error_of(call: Callable[[], object]) -> Exception | None:
    """What `call` raises: the failure of one request is its own, and must end neither the others nor the server."""
    try:
        call()
    except Exception as error:
        return error
    return None
