"""Tokens to text, one token at a time, held back while it may still become a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MAX_CHARACTER_TOKENS = 4
"""A character of UTF-8 has at most 4 bytes, each a token where the vocabulary lacks it: longer waits are in vain."""


class TextStream:
    """`add(token)` returns the text that is certain by now; `stopped` turns true at a stop string.

    Bytes of an unfinished character and the possible beginning of a stop string are held back until they are
    decided, or `flush` is called.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._held = ""
        self._said: list[int] = []  # the tokens that gave the latest text: what follows may depend on them
        self._pending: list[int] = []  # tokens that gave no text yet
        self.stopped = False

    def add(self, token: int) -> str:
        if self.stopped:
            return ""
        self._pending.append(token)
        self._held += self._decoded(len(self._pending) >= MAX_CHARACTER_TOKENS)
        at = min((i for i in map(self._held.find, self._stop) if i >= 0), default=-1)
        if at >= 0:
            self.stopped = True
            out, self._held = self._held[:at], ""
            return out
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out

    def _decoded(self, at_any_rate: bool) -> str:
        """Text of the pending tokens, if it is complete."""
        before, text = self._decode(self._said), self._decode(self._said + self._pending)
        if len(text) <= len(before) or (text.endswith("\ufffd") and not at_any_rate):
            return ""
        self._said, self._pending = self._pending, []
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""

    def flush(self) -> str:
        """What was held back, at the end of the text. An unfinished character gives U+FFFD."""
        if self._pending and not self.stopped:
            self._held += self._decoded(at_any_rate=True)
        out, self._held = self._held, ""
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that a `stop` begins with."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
