"""`make demo`: the whole job on the embedded model, and a short table of what it cost and what it kept."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch

import unicorn_backend
from unicorn_backend import bench, measure, models, table
from unicorn_backend.quantize.quality import compare

PROMPT = "The film is a"


def demo(rounds: int = 7, new_tokens: int = 96) -> dict[str, Any]:
    """Quantize, compile, generate, measure. Prints nothing; returns everything that `report` shows."""
    original, tokenizer = models.load(), models.load_tokenizer()
    model = copy.deepcopy(original)
    start = time.perf_counter()
    unicorn_backend.quantize(model)
    quantize_s = time.perf_counter() - start

    compiled = torch.compile(model, backend="unicorn")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    start = time.perf_counter()
    output = compiled.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    first_s = time.perf_counter() - start
    return {
        "bytes_before": measure.model_bytes(original),
        "bytes_after": measure.model_bytes(model),
        "quantize_s": quantize_s,
        "first_generate_s": first_s,
        "text": tokenizer.decode(output[0], skip_special_tokens=True),
        "quality": _quality(original, compiled),
        "speed": bench.bench(bench.Workload(new_tokens=new_tokens, rounds=rounds)),
    }


def _quality(original: Any, compiled: Any) -> dict[str, Any]:
    """KL divergence and top-1 agreement against the bf16 model on held-out text, with standard errors."""
    raise NotImplementedError


def report(result: dict[str, Any]) -> str:
    """The result as a short table for people."""
    before, after, quality = result["bytes_before"], result["bytes_after"], result["quality"]
    rows = [
        ("weights", f"{table.size(before)} -> {table.size(after)} ({after / before:.0%})"),
        ("quantized in", f"{result['quantize_s']:.2f} s"),
        ("first generate", f"{result['first_generate_s']:.1f} s (compiles)"),
    ]
    return "\n".join(
        [
            "tiny-gemma3: a trained 7M-parameter Gemma 3, embedded in this package (it writes nonsense)",
            "",
            table.text(("quantize", ""), rows),
        ]
    )
