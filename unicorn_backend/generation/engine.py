"""A loaded model that answers requests one after another: what `run`, `chat` and `serve` share."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from unicorn_backend import models
from unicorn_backend.errors import RequestError
from unicorn_backend.generation.answer import Answer
from unicorn_backend.generation.assistant import Assistant, AssistedDrafter
from unicorn_backend.generation.batch import ROWS, Batch
from unicorn_backend.generation.drafting import Costs, Drafter
from unicorn_backend.generation.meter import Meter
from unicorn_backend.generation.prefix import PrefixStore
from unicorn_backend.generation.request import OnText, Result, Settings
from unicorn_backend.integration.model_state import one_state
from unicorn_backend.integration.prepare import plans_of
from unicorn_backend.options import Options
from unicorn_backend.plan import placements


class Engine:
    """A compiled model with its tokenizer and the keys and values of its latest conversations."""

    def __init__(
        self,
        name: str | Path = "tiny",
        options: Mapping[str, Any] | None = None,
        *,
        model: Any = None,
        tokenizer: Any = None,
        prefix_bytes: int = 1 << 30,
        assistant: str | Path | Assistant | None = None,
    ) -> None:
        """name: folder, hub id, or a name of `unicorn_backend.models`; model, tokenizer: already loaded ones.

        options: of `torch.compile(..., options=)` (`options.py`). A wrong one raises before anything is loaded.
        assistant: a smaller model of the same vocabulary, which drafts tokens for settings with `speculate`.
        """
        Options.parse(options)
        self.name = str(name)
        self.tokenizer = models.load_tokenizer(name) if tokenizer is None else tokenizer
        original = models.load(name) if model is None else model
        self.original = original
        self.model: Any = torch.compile(original, backend="unicorn", options=dict(options or {}))
        self.config = original.config.get_text_config()
        self.context: int = getattr(self.config, "max_position_embeddings", None) or 1 << 30
        self.prefixes = PrefixStore(self.model, prefix_bytes)
        if assistant is not None and not isinstance(assistant, Assistant):
            assistant = Assistant(assistant, options, self.tokenizer, prefix_bytes=prefix_bytes)
        self.assistant = assistant
        self._costs = Costs()
        self.lock = threading.Lock()  # held by who calls the model or touches the prefixes
        self._meter: Meter | None = None

    @property
    def meter(self) -> Meter:
        """Known once the model is quantized, which its first call does."""
        if self._meter is None:
            self._meter = Meter.of(self.model)
        return self._meter

    def meter_line(self, tokens_per_second: float, tokens: int) -> str:
        """The live line of a running answer; one call of the model per token is assumed."""
        return f"{tokens} tokens · " + self.meter.describe(tokens_per_second, tokens_per_second, tokens)

    def placements(self) -> list[str]:
        """What runs where and why, where another device than the CPU was named; known once something ran."""
        return placements(plans_of(self.original))

    def summary(self, result: Result) -> str:
        """One line about a finished answer: speed, first token, what was reused, how it ended."""
        context = result.prompt_tokens + len(result.ids)
        parts = [
            f"{len(result.ids)} tokens",
            self.meter.describe(result.tokens_per_second, result.calls_per_second, context),
            f"first token {result.first_token_s * 1e3:.0f} ms, {result.reused_tokens} of {result.prompt_tokens} reused",
            f"context {context} of {self.context}",
        ]
        if result.drafted:
            parts.append(f"{result.accepted} of {result.drafted} drafted tokens right")
        if result.compiled:
            parts.append(f"{result.compiled} graphs compiled, not in the tok/s: the next answer starts faster")
        endings = {"length": "cut at the length limit", "cancelled": "stopped"}
        if result.finish in endings:
            parts.append(endings[result.finish])
        return " · ".join(parts)

    def warm_up(self, speculate: bool = False, rows: int = 1) -> float:
        """Quantize and compile now instead of in the first request. Returns the seconds it took.

        rows: more than 1 if several answers will be decoded together.
        """
        start = time.perf_counter()
        ids = models.sample_ids(12, models.TINY).clamp(max=self.config.vocab_size - 1)[0].tolist()
        settings = Settings(max_new_tokens=3, ignore_eos=True, temperature=0.0)
        self.generate(ids, settings)
        self.generate([*ids, *ids], settings)  # a prompt on a cache that is not empty
        if rows > 1:
            self.generate_many([(ids, settings), (ids[3:], settings)])
        if speculate:
            self.generate(ids * 3, Settings(max_new_tokens=12, ignore_eos=True, speculate=True))
            if self.assistant is not None:
                self.assistant.warm_up(ids)
                self.assistant.prefixes.clear()
        self.prefixes.clear()
        return time.perf_counter() - start

    def encode(self, prompt: str) -> list[int]:
        """Ids of plain text, with the tokenizer's own beginning-of-text token."""
        return list(self.tokenizer(prompt).input_ids)

    def render(self, messages: Sequence[dict[str, Any]], tools: Any = None, **template: Any) -> str:
        """The text that the model's chat template makes of a conversation, up to where the model answers."""
        from jinja2 import TemplateError

        if self.tokenizer.chat_template is None:
            raise RequestError(f"{self.name} has no chat template: it is not a chat model; use plain completion")
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages), tools=tools, add_generation_prompt=True, tokenize=False, **template
                )
            )
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise RequestError(f"the chat template of {self.name} refuses these messages: {error}") from error

    def encode_rendered(self, text: str) -> list[int]:
        """Ids of what `render` returned; its special tokens are already in the text."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def for_chat(self, settings: Settings) -> Settings:
        """The same settings, ended also by what the chat template writes after an answer ("<end_of_turn>")."""
        mark = "\x02answer\x03"
        end = self.render([{"role": "user", "content": "x"}, {"role": "assistant", "content": mark}])
        end = end.partition(mark)[2].strip().split("\n")[0]
        tokens = self.encode_rendered(end)
        if len(tokens) == 1:
            return replace(settings, stop_tokens=(*settings.stop_tokens, *tokens))
        return replace(settings, stop=(*settings.stop, end)) if end else settings

    def generate(
        self,
        ids: Sequence[int],
        settings: Settings,
        on_text: OnText | None = None,
        cancelled: threading.Event | None = None,
    ) -> Result:
        """Continue `ids`. Blocks; requests of other threads wait. Raises RequestError if the prompt does not fit."""
        with self.lock, one_state(), torch.no_grad():
            answer = Answer(self, ids, settings, on_text, cancelled)
            answer.begin()
            while not answer.done:
                answer.sequence.step()
            return answer.result()

    def generate_many(self, requests: Iterable[tuple[Sequence[int], Settings]], rows: int = ROWS) -> list[Result]:
        """Continue several prompts, up to `rows` at a time together. Results in the order of the requests.

        Each result is that of its request alone, see `generation/batch.py`. The first failure is raised at the end.
        """
        batch, results = Batch(self, rows), dict[int, Result | Exception]()
        left = enumerate(requests)
        with one_state():
            while True:
                while batch.has_room and (following := next(left, None)) is not None:
                    index, (ids, settings) = following
                    batch.add(index, list(ids), settings)
                if not batch:
                    break
                results.update(batch.step())
        return [_result(results[index]) for index in range(len(results))]

    def check(self, ids: Sequence[int]) -> None:
        """Raises RequestError if these ids cannot be continued."""
        if not ids:
            raise RequestError("the prompt is empty: got 0 tokens, at least 1 is needed")
        if len(ids) >= self.context:
            raise RequestError(
                f"the prompt has {len(ids)} tokens and {self.name} has a context of {self.context}; shorten it",
                code="context_length_exceeded",
            )
        worst = max(ids)
        if worst >= self.config.vocab_size or min(ids) < 0:
            raise RequestError(f"token ids must be in [0, {self.config.vocab_size}), got {worst}")

    def drafter(self, settings: Settings) -> Drafter | AssistedDrafter:
        """What drafts tokens of one answer."""
        lookup = Drafter(costs=self._costs)
        return AssistedDrafter(self.assistant, lookup, self.config.vocab_size) if self.assistant else lookup

    def generation_config(self, settings: Settings, limit: int) -> Any:
        """The settings as transformers' own, for at most `limit` new tokens."""
        from transformers import GenerationConfig

        sample: dict[str, Any] = {"do_sample": settings.temperature > 0}
        if settings.temperature > 0:
            sample |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
        if settings.repetition_penalty != 1:
            sample["repetition_penalty"] = settings.repetition_penalty
        pad = self.tokenizer.pad_token_id
        return GenerationConfig(
            max_new_tokens=limit, eos_token_id=None, pad_token_id=pad if pad is not None else 0, **sample
        )

    def end_tokens(self) -> frozenset[int]:
        """Ids that end a text: of the model's generation config, or the tokenizer's."""
        known = self.original.generation_config.eos_token_id
        ids = [known] if isinstance(known, int) else list(known or ())
        return frozenset(ids or [i for i in [self.tokenizer.eos_token_id] if i is not None])


def _result(outcome: Result | Exception) -> Result:
    if isinstance(outcome, Exception):
        raise outcome
    return outcome
