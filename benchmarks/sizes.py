"""Write benchmarks/results/sizes.json: the bytes of each recipe for Gemma 3's true shapes. Arithmetic, nothing is run.

The models stand on torch's meta device, with the vision tower and projector of the sizes that have them. What counts
is what a checkpoint holds and what lies in memory: the packed tensors with their padding and the float ones.

    python benchmarks/sizes.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gguf import GGML_QUANT_SIZES
from transformers import Gemma3Config

from unicorn_backend.formats.gguf_out import type_of
from unicorn_backend.layouts import packed_bytes
from unicorn_backend.models.random import CONFIGS, config
from unicorn_backend.quantize import rewrite
from unicorn_backend.quantize.recipe import Recipe
from unicorn_backend.quantize.skeleton import empty_model

RESULT = Path(__file__).parent / "results" / "sizes.json"
RECIPES = ("none", "int8", "default", "q4_k_m", "hybrid", "q4", "ultra")
# SigLIP as in the published config.json of google/gemma-3-4b-it, 12b and 27b.
VISION = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "image_size": 896,
    "patch_size": 14,
    "vision_use_head": False,
}


def model(name: str) -> Any:
    """The named Gemma 3 in bf16 on meta; from 4B on with its vision tower."""
    text = config(name)
    if name != "gemma3-1b":
        text = Gemma3Config(text_config=text, vision_config=VISION, architectures=["Gemma3ForConditionalGeneration"])
    return empty_model(text, torch.bfloat16)


def schemes(whole: Any, recipe: str) -> dict[str, str]:
    """{weight of a module: scheme}, each tied weight once."""
    jobs, _ = rewrite.plan(whole, Recipe.named(recipe).fitted(whole), whole.all_tied_weights_keys)
    return {f"{job.users[0][0]}.weight": job.scheme for job in jobs}


def linears(whole: Any) -> Iterator[tuple[str, str, torch.Tensor]]:
    """("attention" or "ffn", name, weight) of the text model's layers."""
    for name, parameter in whole.named_parameters():
        if parameter.dim() == 2 and ".layers." in name and "vision" not in name:
            yield "attention" if "self_attn" in name else "ffn", name, parameter


def total_bytes(whole: Any, packed: dict[str, str]) -> int:
    """Of everything; a tied weight counts once."""
    parameters = ((n, p) for n, p in whole.named_parameters() if n not in whole.all_tied_weights_keys)
    return sum(packed_bytes(*p.shape, packed[n]) if n in packed else p.nbytes for n, p in parameters)


def bits_per_weight(whole: Any, packed: dict[str, str], as_gguf: bool = False) -> dict[str, float]:
    """Of the layers' linears, together and by kind; as_gguf: in llama.cpp's blocks, where rows of other multiples
    than 256 get the substitutes of its k-quants."""
    bits, weights = dict.fromkeys(("layers", "attention", "ffn"), 0.0), dict.fromkeys(("layers", "attention", "ffn"), 0)
    for kind, name, weight in linears(whole):
        elements, size = GGML_QUANT_SIZES[type_of(packed[name], tuple(weight.shape))] if as_gguf else (0, 0)
        nbytes = weight.numel() * size / elements if as_gguf else weight.nbytes
        if name in packed and not as_gguf:
            nbytes = packed_bytes(*weight.shape, packed[name])
        for part in ("layers", kind):
            bits[part] += 8 * nbytes
            weights[part] += weight.numel()
    return {part: bits[part] / weights[part] for part in bits}


def row(name: str) -> dict[str, Any]:
    whole = model(name)
    recipes = {recipe: schemes(whole, recipe) for recipe in RECIPES}
    return {
        "model": name,
        "llama.cpp": bits_per_weight(whole, recipes["q4_k_m"], as_gguf=True),
        "recipes": {
            recipe: {"bytes": total_bytes(whole, packed), "bits": bits_per_weight(whole, packed)}
            for recipe, packed in recipes.items()
        },
    }


def main() -> None:
    rows = [row(name) for name in CONFIGS]
    RESULT.write_text(json.dumps({"schema": 1, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
