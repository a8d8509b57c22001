"""The next token from its scores: by native ops where these are float32 on the CPU, with the tokens of torch.

`greedy` is `torch.argmax`; a `Sampler` is top-k, top-p, softmax and `torch.multinomial` in one step. A row that the op
does not decide (`ops.py`: about one in a hundred, where rounding might) goes through transformers' and torch's own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def greedy(scores: Tensor) -> Tensor:
    """The first largest of scores [B, V], as int64 [B]."""
    return torch.ops.unicorn.argmax(scores) if _taken(scores) else scores.argmax(-1)


def best_of(processors: Iterable[Any], sampler: Sampler | None) -> int:
    """How many of the largest scores decide which token comes, with those equal to the last of them; 0: all may.

    processors: those of transformers. sampler: made of them, None for greedy decoding.
    """
    if sampler is None:
        return int(not list(processors))
    ordered = all(type(processor) is _warpers()[2] for processor in sampler.before)  # a temperature keeps the order
    return sampler.top_k if ordered else 0


class Sampler:
    """Draws tokens as transformers does after these logits processors.

    before: the processors that come first, to be called as ever. A top-k and a top-p at the end are the op's.
    whole: keep all of them in `before`, for who wants to see their scores.
    Attribute `top_k`: how many scores are left at most, 0 for all.
    """

    def __init__(self, processors: Iterable[Any], *, whole: bool = False) -> None:
        self.before = list(processors)
        self._last: list[Any] = []
        self.top_k, self._top_p, self._keep = 0, 1.0, 1
        top_k, top_p, _ = _warpers()
        if not whole and (warper := self._take_last(top_p)) is not None:
            self._top_p, self._keep = warper.top_p, warper.min_tokens_to_keep
        if not whole and (warper := self._take_last(top_k)) is not None:
            self.top_k = warper.top_k

    def _take_last(self, kind: type) -> Any:
        """The last processor if it is of this very kind and removes by -inf."""
        last = self.before[-1] if self.before else None
        if type(last) is not kind or getattr(last, "filter_value", 0) != -float("inf"):
            return None
        self._last.insert(0, self.before.pop())
        return last

    def __call__(self, ids: Tensor, scores: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """int64 [B, 1] from scores [B, V] that `before` gave. ids [B, T]: the tokens so far."""
        if _taken(scores):
            tokens: Tensor = torch.ops.unicorn.sample(scores, self.top_k, self._top_p, self._keep, generator)
            if tokens.shape[0] == scores.shape[0]:
                return tokens
        for processor in self._last:
            scores = processor(ids, scores)
        return torch.multinomial(functional.softmax(scores, dim=-1), num_samples=1, generator=generator)


def _taken(scores: Tensor) -> bool:
    return type(scores) is Tensor and scores.dtype == torch.float32 and scores.is_cpu and scores.dim() == 2


@functools.cache
def _warpers() -> tuple[type, type, type]:
    from transformers.generation import logits_process

    return logits_process.TopKLogitsWarper, logits_process.TopPLogitsWarper, logits_process.TemperatureLogitsWarper
