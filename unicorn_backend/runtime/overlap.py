"""Attention of a prompt on one device beside the feed-forward on another, in chunks of tokens.

Keys and values of all tokens are there before a layer's attention starts, and a row of the feed-forward needs nothing
but the attention of its own token. So, within one layer of one forward,

    device   a0  a1  a2  a3
    cpu          f0  f1  f2  f3

and the results are those of the two regions one after the other, bit for bit.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

enabled = True  # `timed` wants the time of each region alone

Part = tuple[slice, Tensor] | str  # tokens and their result [B, t, n], or why there is none


@dataclass
class _Coming:
    """An attention on its way."""

    x: Tensor  # [B, T, n], the result, filled part by part
    parts: Iterator[Part]
    whole: Callable[[str], Tensor]  # the CPU's result, where the device gives a reason
    worker: ThreadPoolExecutor
    next: Future[Part | None] = field(init=False)

    def ahead(self) -> None:
        self.next = self.worker.submit(_next, self.parts, torch.is_inference_mode_enabled())


class Overlap:
    """One attention and the feed-forward that alone reads it. Any thread; a thread's calls come in pairs."""

    def __init__(self) -> None:
        self._local = threading.local()

    def start(self, arguments: Sequence[Any], parts: Iterator[Part], whole: Callable[[str], Tensor]) -> Tensor:
        """int8_attention's result, not there before `finish`. arguments: of int8_attention."""
        q, n = arguments[0], arguments[9]
        x: Tensor = q.new_empty((q.shape[0], q.shape[2], n))
        coming = _Coming(x, parts, whole, ThreadPoolExecutor(1, "unicorn-overlap"))
        coming.ahead()
        self._local.coming = coming
        return x

    def finish(self, arguments: Sequence[Any], run: Callable[[tuple[Any, ...]], Tensor]) -> Tensor | None:
        """The feed-forward's result; None where its input is no result of `start`. arguments: of int4_ffn."""
        coming = getattr(self._local, "coming", None)
        if coming is None or coming.x.data_ptr() != arguments[0].data_ptr():
            return None
        del self._local.coming
        x, done = coming.x, []
        with coming.worker:
            while (part := coming.next.result()) is not None:
                if isinstance(part, str):
                    x.copy_(coming.whole(part))
                    done = [run(tuple(arguments))]
                    break
                tokens, values = part
                coming.ahead()
                x[:, tokens] = values
                done.append(run(_rows(arguments, tokens)))
        return torch.cat(done, 1)


def ranges(tokens: int, count: int) -> list[slice]:
    """`count` ranges that differ by one at most."""
    ends = [tokens * i // count for i in range(count + 1)]
    return [slice(begin, end) for begin, end in itertools.pairwise(ends)]


def _rows(arguments: Sequence[Any], tokens: slice) -> tuple[Any, ...]:
    """int4_ffn's arguments for some tokens: x is the first, the residual the last."""
    x, *rest, residual = arguments
    return (x[:, tokens].contiguous(), *rest, None if residual is None else residual[:, tokens].contiguous())


def _next(parts: Iterator[Part], inference: bool) -> Part | None:
    with torch.inference_mode(inference), torch.no_grad():  # both belong to a thread
        return next(parts, None)
