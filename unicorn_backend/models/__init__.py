"""Models this package brings or can build: the embedded trained one, and random ones of true sizes.

`load("tiny")` is the embedded 7M-parameter Gemma 3 (trained, see README.md here), `load("gemma3-1b")` and
`load("gemma3-4b")` have the real shapes with random weights (speed only), anything else is a local folder,
a hub id, or a GGUF file (also by the folder that holds nothing else, or as "owner/name/file.gguf").
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from unicorn_backend import assets
from unicorn_backend.errors import CheckpointError
from unicorn_backend.models.random import CONFIGS, random_model

__all__ = ["CONFIGS", "SAMPLE_TEXT", "TINY", "load", "load_tokenizer", "sample_ids"]

TINY = assets.embedded_model()
SAMPLE_TEXT = TINY.parent / "wikitext2-test-head.txt"


def load(name: str | Path = "tiny") -> Any:
    """A causal language model in evaluation mode, in the dtype of its checkpoint."""
    from transformers import AutoModelForCausalLM

    if str(name) in CONFIGS:
        return random_model(str(name))
    if (file := _gguf(name)) is not None:
        return _load_gguf(file)
    try:
        return AutoModelForCausalLM.from_pretrained(_resolve(name), dtype="auto").eval()
    except OSError as error:
        raise CheckpointError(_not_found(name, error)) from error


def load_tokenizer(name: str | Path = "tiny") -> Any:
    """The tokenizer beside the model; random models use the embedded one (their ids are all valid)."""
    from transformers import AutoTokenizer

    try:
        if (file := _gguf(name)) is not None:
            return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        return AutoTokenizer.from_pretrained(TINY if str(name) in CONFIGS else _resolve(name))
    except OSError as error:
        raise CheckpointError(_not_found(name, error)) from error


def only_gguf(folder: Path) -> Path | None:
    """The GGUF file of a folder that has one and no safetensors. CheckpointError if it has several."""
    if not folder.is_dir() or any(folder.glob("*.safetensors*")):
        return None
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        raise CheckpointError(f"{folder}: several GGUF files ({files[0].name}, {files[1].name}, ...): name one")
    return files[0] if files else None


def _gguf(name: str | Path) -> Path | None:
    path = Path(name)
    if path.suffix != ".gguf" or path.is_dir():
        return only_gguf(path)
    if path.exists():
        return path
    from unicorn_backend.quantize.source import find

    return find(name)


def _load_gguf(path: Path) -> Any:
    """The float model of a GGUF file, after its header was checked."""
    from transformers import AutoModelForCausalLM

    from unicorn_backend.formats import gguf_model

    header = gguf_model.read_header(path)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, config=gguf_model.read_config(header), dtype=gguf_model.dtype_of(header)
    )
    return model.eval()


def sample_ids(tokens: int, name: str | Path = "tiny") -> torch.Tensor:
    """int64 [1, tokens]: the head of WikiText-2 test in the tokens of the named model, repeated if short."""
    ids: torch.Tensor = load_tokenizer(name)(SAMPLE_TEXT.read_text(encoding="utf-8"), return_tensors="pt").input_ids
    return ids.repeat(1, -(-tokens // ids.shape[1]))[:, :tokens]


def _resolve(name: str | Path) -> str:
    return str(TINY if str(name) == "tiny" else name)


def _not_found(name: str | Path, error: OSError) -> str:
    reason = str(error).strip().splitlines()[0]
    known = ", ".join(("tiny", *CONFIGS))
    return f"cannot load model {str(name)!r}: {reason} Give a local folder, a hub id, or one of: {known}."
