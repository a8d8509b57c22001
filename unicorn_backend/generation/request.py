"""What is asked for and what comes out: settings and results of one generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from unicorn_backend.errors import OptionError


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
    shared_calls: float = 0.0  # as `calls`, but of a call for several requests this one's share
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
