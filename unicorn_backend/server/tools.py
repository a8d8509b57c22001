"""Tools: given to the chat template, and calls found in what the model wrote, by transformers' own parser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from unicorn_backend.generation.engine import Engine
from unicorn_backend.generation.request import Result
from unicorn_backend.server.protocol import new_id


def template_knows_tools(engine: Engine) -> bool:
    """True if the chat template mentions tools: others would drop them without a word."""
    template = engine.tokenizer.chat_template
    texts = template.values() if isinstance(template, dict) else [template or ""]
    return any("tools" in text for text in texts)


def parse_tools(engine: Engine, ids: Sequence[int], result: Result, tools: Any) -> tuple[str, list[dict[str, Any]]]:
    """Text and calls (in the API's form) of an answer to the prompt `ids`.

    The model says how it writes calls (`response_template` of its tokenizer, or transformers' table of known
    models); without that the text is returned as it is.
    """
    if not tools:
        return result.text, []
    from transformers.cli.serving.utils import parse_assistant_message

    text, _, calls = parse_assistant_message(
        engine.tokenizer, engine.original, result.ids, list(ids), cleaned_content=result.text, tools=tools
    )
    shaped = [
        {"id": new_id("call"), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in calls or ()
    ]
    return text, shaped
