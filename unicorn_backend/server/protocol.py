"""What the OpenAI API sends and expects, as far as this server knows it. Unknown fields are refused by name.

Fields that ask for something else than text in one choice are accepted only with the value that means nothing.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from unicorn_backend.generation.engine import Engine
from unicorn_backend.generation.request import Result, Settings, TokenLogprob

MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20

Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class StreamOptions(BaseModel):
    include_usage: bool = False
    include_obfuscation: bool = False


class Common(BaseModel):
    """What both kinds of completion know.

    `top_k`, `repetition_penalty`, `speculate` and `ignore_eos` are extensions of the API.
    """

    model_config = ConfigDict(extra="forbid")

    model: str = ""
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    speculate: bool | None = None
    ignore_eos: bool = False
    user: str | None = None
    n: Literal[1] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    def limit(self) -> int | None:
        return self.max_tokens

    def wanted_logprobs(self) -> int | None:
        return None

    def settings(self, default_max_tokens: int, speculate: bool) -> Settings:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Settings(
            max_new_tokens=self.limit() or default_max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            stop=stop,
            top_logprobs=self.wanted_logprobs(),
            speculate=speculate if self.speculate is None else self.speculate,
            ignore_eos=self.ignore_eos,
        )


class ContentPart(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn. Content in parts is joined; images and audio are refused."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    tool_calls: list[dict[str, Any]] | None = None

    def plain(self) -> dict[str, Any]:
        text = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content or ())
        role = "system" if self.role == "developer" else self.role
        extra = {k: v for k, v in (self.model_extra or {}).items() if k in ("name", "tool_call_id")}
        calls = {"tool_calls": self.tool_calls} if self.tool_calls else {}
        return {"role": role, "content": text, **calls, **extra}


class ChatRequest(Common):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None

    @model_validator(mode="after")
    def _agrees(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Common):
    """`prompt`: text, or token ids; a list of one of them is taken as that one."""

    prompt: (
        str | list[int] | Annotated[list[str], Field(max_length=1)] | Annotated[list[list[int]], Field(max_length=1)]
    )
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    def limit(self) -> int | None:
        return self.max_tokens or 16  # the API's own default for this endpoint

    def wanted_logprobs(self) -> int | None:
        return self.logprobs

    def one_prompt(self) -> str | list[int]:
        prompt: Any = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            prompt = prompt[0]
        return prompt  # type: ignore[no-any-return]


def new_id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex[:24]}"


def usage(prompt: int, completion: int, reused: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": reused},
    }


def usage_of(result: Result) -> dict[str, Any]:
    return usage(result.prompt_tokens, len(result.ids), result.reused_tokens)


def finish_of(result: Result) -> str:
    return "length" if result.finish == "length" else "stop"


def chat_logprobs(engine: Engine, items: Sequence[TokenLogprob]) -> dict[str, Any]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = engine.tokenizer.decode([token])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    content = [{**entry(i.token, i.logprob), "top_logprobs": [entry(*pair) for pair in i.top]} for i in items]
    return {"content": content, "refusal": None}


def text_logprobs(engine: Engine, items: Sequence[TokenLogprob], offset: int = 0) -> dict[str, Any]:
    tokens = [engine.tokenizer.decode([i.token]) for i in items]
    offsets = [offset + sum(map(len, tokens[:i])) for i in range(len(tokens))]
    return {
        "tokens": tokens,
        "token_logprobs": [i.logprob for i in items],
        "top_logprobs": [{engine.tokenizer.decode([t]): p for t, p in i.top} for i in items],
        "text_offset": offsets,
    }


def envelope(kind: str, model: str, identity: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": identity, "object": kind, "created": int(time.time()), "model": model, "choices": choices}


def error(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
