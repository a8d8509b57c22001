"""A loaded model that answers requests one after another: what `run`, `chat` and `serve` share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from unicorn_backend import models
from unicorn_backend.errors import OptionError, RequestError
from unicorn_backend.generation.assistant import Assistant, AssistedDrafter
from unicorn_backend.generation.decode import Loop
from unicorn_backend.generation.drafting import Costs, Drafter
from unicorn_backend.generation.meter import Meter
from unicorn_backend.generation.prefix import PrefixStore
from unicorn_backend.generation.text import TextStream
from unicorn_backend.integration.prepare import plans_of
from unicorn_backend.options import Options
from unicorn_backend.plan import placements


@dataclass(frozen=True)
class Settings:
    """How to generate. temperature 0 is greedy; `seed` None draws from the process-wide generator.

    top_logprobs: None for no log probabilities, else how many alternatives per token (0: the chosen one only).
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()  # besides the model's own end tokens
    top_logprobs: int | None = None
    speculate: bool = False
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        limits = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature <= 100, "0 to 100"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("repetition_penalty", 0 < self.repetition_penalty <= 10, "above 0, at most 10"),
            ("stop", all(self.stop), "non-empty strings"),
        )
        for name, fine, allowed in limits:
            if not fine:
                raise OptionError(f"{name}: got {getattr(self, name)!r}, allowed is {allowed}")


@dataclass(frozen=True)
class TokenLogprob:
    """Log probability of a token under the unprocessed logits, and of the likeliest ones, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass
class Result:
    """One finished generation."""

    ids: list[int]  # of the new tokens, the one that ended it included
    text: str
    finish: str  # "stop", "length" or "cancelled"
    prompt_tokens: int
    reused_tokens: int  # of the prompt, computed by an earlier request
    reuse_note: str
    first_token_s: float
    seconds: float
    calls: int  # of the model
    drafted: int
    accepted: int
    compiled: int  # graphs, in this request: its times include that, its rates do not
    compile_calls: int = 0  # after the first one, in which graphs were compiled
    compile_s: float = 0.0  # of those calls
    logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens after the first, without those whose call compiled; 0 if there are no others."""
        return self._rate(len(self.ids) - 1 - self.compile_calls)

    @property
    def calls_per_second(self) -> float:
        return self._rate(self.calls - 1 - self.compile_calls)

    def _rate(self, count: int) -> float:
        return count / (self.seconds - self.first_token_s - self.compile_s) if count > 0 else 0.0


OnText = Callable[[str, Sequence[TokenLogprob]], bool | None]
"""Called with each certain piece of text and the log probabilities of the tokens since the last call; True stops."""


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
        self._lock = threading.Lock()
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

    def warm_up(self, speculate: bool = False) -> float:
        """Quantize and compile now instead of in the first request. Returns the seconds it took."""
        start = time.perf_counter()
        ids = models.sample_ids(12, models.TINY).clamp(max=self.config.vocab_size - 1)[0].tolist()
        settings = Settings(max_new_tokens=3, ignore_eos=True, temperature=0.0)
        self.generate(ids, settings)
        self.generate([*ids, *ids], settings)  # a prompt on a cache that is not empty
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
        self.check(ids)
        with self._lock:
            return self._generate(list(ids), settings, on_text, cancelled)

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

    def _generate(
        self, ids: list[int], settings: Settings, on_text: OnText | None, cancelled: threading.Event | None
    ) -> Result:
        taken = self.prefixes.take(ids)
        stream = TextStream(self.tokenizer, settings.stop)
        texts: list[str] = []
        new: list[int] = []
        logprobs: list[TokenLogprob] = []
        said = 0  # log probabilities that were handed on
        ends = frozenset() if settings.ignore_eos else self._end_tokens().union(settings.stop_tokens)
        stopped = ""

        def on_token(token: int, logits: torch.Tensor) -> bool:
            nonlocal said, stopped
            new.append(token)
            compiling.look(loop.token_times)
            if settings.top_logprobs is not None:
                logprobs.append(_logprob(logits, token, settings.top_logprobs))
            piece = stream.add(token) if token not in ends else ""
            if piece:
                texts.append(piece)
                if on_text is not None and on_text(piece, logprobs[said:]):
                    stopped = "cancelled"
                said = len(logprobs)
            if cancelled is not None and cancelled.is_set():
                stopped = "cancelled"
            elif stream.stopped or token in ends:
                stopped = "stop"
            return bool(stopped)

        compiling = _Compiling(self.original)
        loop = Loop(on_token, _generator(settings), self._drafter(settings))
        limit = min(settings.max_new_tokens, self.context - len(ids))
        sequence = self.model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            past_key_values=taken.cache,
            custom_generate=loop,
            generation_config=self._config(settings, limit),
        )
        seconds = time.perf_counter() - loop.start
        self.prefixes.put(sequence[0].tolist(), taken.cache)
        if (rest := stream.flush()) and stopped != "cancelled":
            texts.append(rest)
            if on_text is not None:
                on_text(rest, logprobs[said:])
        return Result(
            ids=new,
            text="".join(texts),
            finish=stopped or "length",
            prompt_tokens=len(ids),
            reused_tokens=taken.reused,
            reuse_note=taken.note,
            first_token_s=loop.token_times[0],
            seconds=seconds,
            calls=loop.calls,
            drafted=loop.drafted,
            accepted=loop.accepted,
            compiled=compiling.graphs,
            compile_calls=compiling.calls,
            compile_s=compiling.seconds,
            logprobs=logprobs,
        )

    def _drafter(self, settings: Settings) -> Drafter | AssistedDrafter | None:
        if not settings.speculate:
            return None
        lookup = Drafter(costs=self._costs)
        return AssistedDrafter(self.assistant, lookup, self.config.vocab_size) if self.assistant else lookup

    def _config(self, settings: Settings, limit: int) -> Any:
        from transformers import GenerationConfig

        sample: dict[str, Any] = {"do_sample": settings.temperature > 0}
        if settings.temperature > 0:
            sample |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k or None}
        if settings.repetition_penalty != 1:
            sample["repetition_penalty"] = settings.repetition_penalty
        pad = self.tokenizer.pad_token_id
        return GenerationConfig(
            max_new_tokens=limit, eos_token_id=None, pad_token_id=pad if pad is not None else 0, **sample
        )

    def _end_tokens(self) -> frozenset[int]:
        """Ids that end a text: of the model's generation config, or the tokenizer's."""
        known = self.original.generation_config.eos_token_id
        ids = [known] if isinstance(known, int) else list(known or ())
        return frozenset(ids or [i for i in [self.tokenizer.eos_token_id] if i is not None])


class _Compiling:
    """Graphs compiled since it was made; of the calls after the first in which some were, the number and seconds."""

    def __init__(self, model: Any) -> None:
        self._model, self._before = model, len(plans_of(model))
        self.graphs, self.calls, self.seconds = 0, 0, 0.0

    def look(self, token_times: Sequence[float]) -> None:
        """Called with each new token."""
        graphs = len(plans_of(self._model)) - self._before
        if graphs != self.graphs and len(token_times) > 1:
            self.calls += 1
            self.seconds += token_times[-1] - token_times[-2]
        self.graphs = graphs


def _generator(settings: Settings) -> torch.Generator | None:
    return None if settings.seed is None else torch.Generator().manual_seed(settings.seed)


def _logprob(logits: torch.Tensor, token: int, count: int) -> TokenLogprob:
    values = logits.log_softmax(-1)
    top = values.topk(count) if count else None
    pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)) if top is not None else ()
    return TokenLogprob(token, float(values[token]), pairs)
