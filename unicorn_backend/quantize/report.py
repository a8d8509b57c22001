"""`quantization_report.json`: what became of every weight, with checksums that `unicorn verify` checks."""

from __future__ import annotations

import math
import time
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unicorn_backend.quantize.skeleton import Skeleton
    from unicorn_backend.quantize.source import Source
    from unicorn_backend.quantize.stream import Piece

NAME = "quantization_report.json"
VERSION = 1


def weight(piece: Piece, checksums: dict[str, str], sums: list[tuple[float, float]]) -> dict[str, Any]:
    """Record of one weight; sums: (signal, noise) of its blocks, empty sums for a copy."""
    signal, noise = (math.fsum(part) for part in zip(*sums, strict=True))
    shapes = {name: [str(dtype).removeprefix("torch."), list(shape)] for name, (dtype, shape) in piece.outputs.items()}
    return {
        "name": piece.stored.name,
        "scheme": piece.scheme,
        "shape": list(piece.stored.shape),
        "reason": piece.reason,
        "bytes_before": piece.stored.nbytes,
        "bytes_after": sum(dtype.itemsize * math.prod(shape) for dtype, shape in piece.outputs.values()),
        "sqnr_db": decibels(signal, noise),
        "tensors": {
            name: {"dtype": shapes[name][0], "shape": shapes[name][1], "sha256": digest}
            for name, digest in checksums.items()
        },
    }


def decibels(signal: float, noise: float) -> float | None:
    """Signal to noise in dB; None where nothing was lost (JSON has no infinity)."""
    return 10 * math.log10(signal / noise) if noise > 0 and signal > 0 else None


def build(source: Source, model: Skeleton, weights: list[dict[str, Any]], start: float) -> dict[str, Any]:
    """The whole report; start: `time.perf_counter()` at the beginning."""
    before, after = (sum(row[key] for row in weights) for key in ("bytes_before", "bytes_after"))
    seconds = time.perf_counter() - start
    return {
        "format": "unicorn-quantization-report",
        "version": VERSION,
        "source": source.name,
        "recipe": model.recipe.to_dict(),
        "notes": list(source.notes),
        "totals": {
            "weights": len(weights),
            "bytes_before": before,
            "bytes_after": after,
            "bytes_by_scheme": _by_scheme(weights),
            "seconds": round(seconds, 3),
            "gb_per_s": round(before / seconds / 1e9, 3),
        },
        "versions": versions(),
        "weights": weights,
    }


def _by_scheme(weights: list[dict[str, Any]]) -> dict[str, int]:
    schemes = sorted({row["scheme"] for row in weights})
    return {scheme: sum(row["bytes_after"] for row in weights if row["scheme"] == scheme) for scheme in schemes}


def versions() -> dict[str, str]:
    """Versions of what decides about the bytes."""
    return {name: version(name) for name in ("unicorn-backend", "torch", "transformers")}
