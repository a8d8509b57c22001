"""A tokenizer as GGUF metadata, from its tokenizer.json.

The tokenizers of Gemma and Llama 2 are a byte-fallback BPE over text in which spaces became "▁". llama.cpp runs them as
SentencePiece models: it merges the neighbours whose union has the highest score, so a token's score is minus
the rank of the first merge that makes it. Those of Llama 3, Qwen and Mistral Nemo are BPE over bytes, which it
runs as they are, once it knows by name how they split text into words.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from gguf import GGUFReader, GGUFWriter, TokenType
from transformers import AutoTokenizer

from unicorn_backend.errors import CheckpointError

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_NO_MERGE = -1e6  # of single characters and special tokens: nothing is merged into them
_END = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# (pattern of a word, whether a word that is a token is taken whole) -> llama.cpp's name (src/llama-vocab.cpp).
_SPLITTERS = {
    (_WORD + r"\p{N}{1,3}|" + _END, True): "llama-bpe",
    (_WORD + r"\p{N}{1,3}|" + _END, False): "smaug-bpe",
    (_WORD + r"\p{N}|" + _END, False): "qwen2",
    (_TEKKEN, True): "tekken",
}


def write(writer: GGUFWriter, folder: Path, config: Any) -> None:
    """Add tokens, merges or scores, types and special ids. CheckpointError for a tokenizer that llama.cpp has not."""
    path = folder / "tokenizer.json"
    if not path.exists():
        raise CheckpointError(f"{path}: missing; GGUF holds the tokenizer")
    data = json.loads(path.read_text(encoding="utf-8"))
    model = data["model"]
    if model["type"] != "BPE":
        raise CheckpointError(f"{path}: a {model['type']} tokenizer; GGUF is written for BPE")
    tokens, types = _tokens(data, config.vocab_size)
    pairs = [tuple(merge if isinstance(merge, list) else merge.split(" ")) for merge in model["merges"]]
    if model.get("byte_fallback"):
        ranks: dict[str, int] = {}
        for rank, (left, right) in enumerate(pairs):
            ranks.setdefault(left + right, rank)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([-float(ranks[token]) if token in ranks else _NO_MERGE for token in tokens])
        writer.add_add_space_prefix(_has_space_prefix(data))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_splitter(path, data))
        writer.add_token_merges([" ".join(pair) for pair in pairs])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    writer.add_add_bos_token(tokenizer("a").input_ids[0] == config.bos_token_id)
    writer.add_add_eos_token(False)
    _write_ids(writer, config, tokens)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _steps(part: Any, kind: str) -> list[dict[str, Any]]:
    """Itself or its parts, of one of the tokenizer's steps."""
    steps: list[dict[str, Any]] = [] if part is None else part.get(kind, [part])
    return steps


def _has_space_prefix(data: dict[str, Any]) -> bool:
    """Whether a space is put before the text: Llama 2, not Gemma."""
    normal, first = _steps(data.get("normalizer"), "normalizers"), _steps(data.get("pre_tokenizer"), "pretokenizers")
    return any(step["type"] == "Prepend" for step in normal) or any(
        step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never" for step in first
    )


def _splitter(path: Path, data: dict[str, Any]) -> str:
    """llama.cpp's name of how text is split into words. CheckpointError for one that it has not."""
    steps = _steps(data.get("pre_tokenizer"), "pretokenizers")
    patterns = [step["pattern"].get("Regex", "") for step in steps if step["type"] == "Split"]
    if not patterns and any(step["type"] == "ByteLevel" and step.get("use_regex", True) for step in steps):
        return "gpt-2"
    name = _SPLITTERS.get(("".join(patterns), bool(data["model"].get("ignore_merges"))))
    if name is None or len(patterns) != 1:
        raise CheckpointError(
            f"{path}: splits text by {patterns}, ignore_merges {data['model'].get('ignore_merges')}; GGUF is written "
            f"for the tokenizers that llama.cpp calls {', '.join(sorted({*_SPLITTERS.values(), 'gpt-2'}))}"
        )
    return name


def copy(writer: GGUFWriter, source: Path) -> None:
    """Add the tokenizer of another GGUF file, whatever its kind."""
    for key, field in GGUFReader(source).fields.items():
        if key.startswith("tokenizer."):
            kind, *inner = field.types
            writer.add_key_value(key, field.contents(), kind, inner[0] if inner else None)


def _tokens(data: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """(tokens by id, their types); ids that the model has and the tokenizer has not are padding."""
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [int(TokenType.UNUSED)] * size
    for token, i in data["model"]["vocab"].items():
        if i < size:
            tokens[i], types[i] = token, int(TokenType.BYTE if _BYTE.fullmatch(token) else TokenType.NORMAL)
    for added in data.get("added_tokens", ()):
        if added["id"] < size:
            tokens[added["id"]] = added["content"]
            types[added["id"]] = int(_added_type(added))
    unknown = data["model"].get("unk_token")
    if unknown in tokens:
        types[tokens.index(unknown)] = int(TokenType.UNKNOWN)
    return tokens, types


def _added_type(added: dict[str, Any]) -> TokenType:
    if _BYTE.fullmatch(added["content"]):
        return TokenType.BYTE
    return TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED


def _write_ids(writer: GGUFWriter, config: Any, tokens: list[str]) -> None:
    eos = config.eos_token_id
    ids = {
        "bos": config.bos_token_id,
        "eos": eos[0] if isinstance(eos, list) else eos,
        "pad": config.pad_token_id,
    }
    for name, i in ids.items():
        if i is not None:
            getattr(writer, f"add_{name}_token_id")(i)
    if "<end_of_turn>" in tokens:
        writer.add_eot_token_id(tokens.index("<end_of_turn>"))
