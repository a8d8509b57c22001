"""The tokenizer of a Gemma-style model as GGUF metadata, from its tokenizer.json.

Gemma's tokenizer is a byte-fallback BPE over text in which spaces became "▁". llama.cpp runs it as a
SentencePiece model: it merges the neighbours whose union has the highest score, so a token's score is minus
the rank of the first merge that makes it.
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


def write(writer: GGUFWriter, folder: Path, config: Any) -> None:
    """Add tokens, scores, types and special ids. CheckpointError for a tokenizer of another kind."""
    path = folder / "tokenizer.json"
    if not path.exists():
        raise CheckpointError(f"{path}: missing; GGUF holds the tokenizer")
    data = json.loads(path.read_text(encoding="utf-8"))
    model = data["model"]
    if model["type"] != "BPE" or not model.get("byte_fallback"):
        raise CheckpointError(f"{path}: a {model['type']} tokenizer; GGUF is written for byte-fallback BPE (Gemma's)")
    tokens, types = _tokens(data, config.vocab_size)
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge if isinstance(merge, list) else merge.split(" ")
        ranks.setdefault(left + right, rank)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(ranks[token]) if token in ranks else _NO_MERGE for token in tokens])
    writer.add_token_types(types)
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(AutoTokenizer.from_pretrained(folder)("a").input_ids[0] == config.bos_token_id)
    writer.add_add_eos_token(False)
    _write_ids(writer, config, tokens)
    template = folder / "chat_template.jinja"
    if template.exists():
        writer.add_chat_template(template.read_text(encoding="utf-8"))


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
