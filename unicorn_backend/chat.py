"""`unicorn chat`: a conversation in the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from unicorn_backend.errors import OptionError, RequestError
from unicorn_backend.generation.conversation import Conversation
from unicorn_backend.generation.live import stream_answer
from unicorn_backend.generation.request import Result, Settings

HELP = """\
/help              this list
/system TEXT       set the system message (without TEXT: remove it)
/set NAME=VALUE    temperature, top_p, top_k, max_new_tokens, repetition_penalty, seed, speculate
/undo              forget the last question and answer
/retry             answer the last question again
/clear             begin anew
/save FILE         write the conversation as JSON
/load FILE         go on with a saved conversation
/stats             settings, context and memory
/exit              leave (also Ctrl-D); Ctrl-C stops an answer
End a line with \\ to go on in the next one."""


@dataclass
class Chat:
    """The terminal's side of a `Conversation`. `say` runs one line of input; False ends the chat."""

    conversation: Conversation
    console: Console
    monitor: bool = False

    def say(self, line: str) -> bool:
        line = line.strip()
        if not line:
            return True
        if not line.startswith("/"):
            self._answer(lambda **kw: self.conversation.ask(line, **kw))
            return True
        name, _, argument = line[1:].partition(" ")
        action = getattr(self, f"_do_{name}", None)
        if name in ("exit", "quit"):
            return False
        if action is None:
            self._note(f"unknown command /{name}; /help lists them")
            return True
        action(argument.strip())
        return True

    def _answer(self, ask: Callable[..., Result | None]) -> None:
        engine = self.conversation.engine
        result = stream_answer(self.console, ask, engine.meter_line, self.monitor)
        self._note("there is no question to answer yet" if result is None else engine.summary(result))
        if result is not None and result.compiled:
            self._note_placements()

    def _note(self, text: str) -> None:
        self.console.print(text, style="dim", highlight=False, markup=False)

    def _note_placements(self) -> None:
        for line in self.conversation.engine.placements():
            self._note(line)

    def _do_help(self, _: str) -> None:
        self._note(HELP)

    def _do_system(self, text: str) -> None:
        self.conversation.system(text)
        self._note("system message set" if text else "no system message")

    def _do_set(self, text: str) -> None:
        self.conversation.settings = changed(self.conversation.settings, text)
        self._note(f"{text.strip()}")

    def _do_undo(self, _: str) -> None:
        self._note("forgotten" if self.conversation.undo() else "nothing to forget")

    def _do_retry(self, _: str) -> None:
        self._answer(self.conversation.retry)

    def _do_clear(self, _: str) -> None:
        self.conversation.messages = [m for m in self.conversation.messages if m["role"] == "system"]
        self._note("a new conversation")

    def _do_save(self, name: str) -> None:
        if not name:
            raise OptionError("/save: got no file name, expected /save FILE")
        text = json.dumps(self.conversation.messages, indent=1, ensure_ascii=False)
        _file("/save", name, lambda path: path.write_text(text + "\n", encoding="utf-8"))
        self._note(f"{len(self.conversation.messages)} messages in {name}")

    def _do_load(self, name: str) -> None:
        text = _file("/load", name, lambda path: path.read_text(encoding="utf-8"))
        try:
            messages = json.loads(text)
        except json.JSONDecodeError as error:
            raise OptionError(f"/load: {name} is not JSON: {error}") from error
        if not isinstance(messages, list) or not all(
            isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages
        ):
            raise OptionError(f"/load: {name} must hold a list of {{'role': ..., 'content': ...}}")
        self.conversation.messages = messages
        self._note(f"{len(messages)} messages from {name}")

    def _do_stats(self, _: str) -> None:
        engine, settings = self.conversation.engine, self.conversation.settings
        values = ", ".join(f"{f.name}={getattr(settings, f.name)}" for f in fields(settings) if f.name in SETTABLE)
        self._note(f"{engine.name}; {values}\n{engine.prefixes.describe()}")
        self._note_placements()


SETTABLE: dict[str, Callable[[str], Any]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "max_new_tokens": int,
    "repetition_penalty": float,
    "seed": int,
    "speculate": lambda text: {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False}[
        text.lower()
    ],
}


def changed(settings: Settings, text: str) -> Settings:
    """Settings with one NAME=VALUE of `SETTABLE` replaced. Raises OptionError."""
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals or name not in SETTABLE:
        raise OptionError(f"/set: got {text!r}, expected NAME=VALUE with NAME one of {', '.join(SETTABLE)}")
    try:
        return replace(settings, **{name: SETTABLE[name](value)})
    except (ValueError, KeyError) as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"/set: got {value!r} for {name}, expected a number (speculate: on or off)") from error


def _file(command: str, name: str, act: Callable[[Path], Any]) -> Any:
    try:
        return act(Path(name).expanduser())
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{command}: {name}: {error}") from error


def lines(console: Console) -> Iterator[str]:
    """Lines of the terminal, or of a pipe; a `\\` at the end joins the next one."""
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  (line editing and history of `input`)
    while True:
        held = ""
        while True:
            try:
                line = input("> " if interactive and not held else "  " if interactive else "")
            except EOFError:
                if held:
                    yield held
                return
            except KeyboardInterrupt:
                console.print()
                return
            if not line.endswith("\\"):
                break
            held += line[:-1] + "\n"
        yield held + line


def chat(conversation: Conversation, console: Console, monitor: bool = False) -> None:
    """Run until /exit, the end of the input, or Ctrl-C at the prompt. Errors of a line do not end it."""
    loop = Chat(conversation, console, monitor)
    for line in lines(console):
        try:
            if not loop.say(line):
                return
        except (RequestError, OptionError) as error:
            console.print(f"error: {error}", style="red", highlight=False, markup=False)
