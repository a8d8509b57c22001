"""A chat of several turns that computes each token once."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from unicorn_backend.generation.engine import Engine
from unicorn_backend.generation.request import OnText, Result, Settings


@dataclass
class Conversation:
    """Messages so far, and the tokens that the model has seen for them.

    The answer's own tokens go into the next prompt, not those that a tokenizer would make of its text, so that the
    caches of the turn before fit to the last token. `messages` may be changed at will: what still agrees is reused.
    """

    engine: Engine
    settings: Settings = field(default_factory=Settings)
    messages: list[dict[str, Any]] = field(default_factory=list)
    _text: str = ""  # rendered, as the model has seen it
    _ids: list[int] = field(default_factory=list)  # of `_text`

    def ask(self, text: str, on_text: OnText | None = None, cancelled: threading.Event | None = None) -> Result:
        """Add the user's turn and the model's. If it fails, the conversation is as it was before."""
        return self._answer([*self.messages, {"role": "user", "content": text}], on_text, cancelled)

    def retry(self, on_text: OnText | None = None, cancelled: threading.Event | None = None) -> Result | None:
        """Another answer to the last question, or None if there is none."""
        last = max((i for i, m in enumerate(self.messages) if m["role"] == "user"), default=None)
        return None if last is None else self._answer(self.messages[: last + 1], on_text, cancelled)

    def undo(self) -> bool:
        """Forget the last question and its answer. False if there is none."""
        last = max((i for i, m in enumerate(self.messages) if m["role"] == "user"), default=None)
        if last is not None:
            del self.messages[last:]
        return last is not None

    def system(self, text: str) -> None:
        """Set the system message; an empty text removes it."""
        rest = [m for m in self.messages if m["role"] != "system"]
        self.messages = ([{"role": "system", "content": text}] if text else []) + rest

    @property
    def context_tokens(self) -> int:
        """Tokens of the conversation up to now."""
        return len(self._ids)

    def _answer(
        self, messages: list[dict[str, Any]], on_text: OnText | None, cancelled: threading.Event | None
    ) -> Result:
        rendered = self.engine.render(messages)
        if self._text and rendered.startswith(self._text):
            ids = self._ids + self.engine.encode_rendered(rendered[len(self._text) :])
        else:
            ids = self.engine.encode_rendered(rendered)
        result = self.engine.generate(ids, self.engine.for_chat(self.settings), on_text, cancelled)
        self.messages = [*messages, {"role": "assistant", "content": result.text}]
        self._text, self._ids = rendered, ids
        for said in (result.ids, result.ids[:-1]):  # the last one may be what ended the turn, which is no text
            if self.engine.tokenizer.decode(said) == result.text:
                self._text, self._ids = rendered + result.text, ids + said
                break
        return result
