"""`unicorn eval`: a quantized checkpoint against the one it was made from, on a text.

The reference is mapped from its files, so one that is larger than the memory works too, slowly.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch

from unicorn_backend import models
from unicorn_backend.errors import CheckFailedError, CheckpointError, OptionError
from unicorn_backend.quantize import report
from unicorn_backend.quantize.quality import WINDOW, Quality, compare

TOKENS = 16384


def evaluate(
    folder: str | Path,
    reference: str | Path,
    text: str | Path | None = None,
    *,
    tokens: int = TOKENS,
    window: int = WINDOW,
) -> Quality:
    """Compare two checkpoints on at most `tokens` tokens of a UTF-8 text file (None: a piece of WikiText-2).

    The tokenizer is the reference's. Raises CheckpointError and OptionError.
    """
    original, quantized = models.load(reference), models.load(folder)
    sizes = [model.config.get_text_config().vocab_size for model in (original, quantized)]
    if sizes[0] != sizes[1]:
        raise CheckpointError(f"{folder} has {sizes[1]} tokens and {reference} {sizes[0]}: not the same model")
    return compare(quantized, original, _ids(reference, text, tokens), window=window)


def _ids(reference: str | Path, text: str | Path | None, tokens: int) -> torch.Tensor:
    """int64 [1, T]."""
    path = models.SAMPLE_TEXT if text is None else Path(text)
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--text: {path} is no readable UTF-8 text: {error}") from error
    ids: torch.Tensor = models.load_tokenizer(reference)(content, return_tensors="pt").input_ids
    return ids[:, :tokens]


def require(quality: Quality, min_top1: float) -> None:
    """CheckFailedError if fewer than that share of the tokens stay first."""
    if quality.top1 < min_top1:
        raise CheckFailedError(f"same top-1 token {quality.top1:.2%} ± {quality.top1_se:.2%}, below {min_top1:.2%}")


def add_to_report(folder: str | Path, quality: Quality) -> None:
    """Keep the result in the checkpoint's report. The file is replaced whole."""
    path = Path(folder) / report.NAME
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    data["quality"] = dataclasses.asdict(quality)
    new = path.with_suffix(".new")
    report.write_json(new, data)
    os.replace(new, path)
