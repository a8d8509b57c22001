"""`quantization_report.json`: what became of every weight, with checksums that `unicorn verify` checks."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unicorn_backend.quantize.recipe import FLOAT

if TYPE_CHECKING:
    from unicorn_backend.formats.target import Declared, Noise, Target
    from unicorn_backend.quantize.skeleton import Skeleton
    from unicorn_backend.quantize.source import Source
    from unicorn_backend.quantize.stream import Piece

_AGAIN = "were dequantized and quantized again to {scheme}"
_CLOSE = "kept their integers in {scheme}, with its rounding of table and scales (sqnr_db)"
NAME = "quantization_report.json"
VERSION = 1


def weight(
    piece: Piece, label: str, outputs: Declared, written: Mapping[str, tuple[int, str]], sums: list[Noise]
) -> dict[str, Any]:
    """Record of one weight; written: bytes and checksum of each output; sums: of its blocks."""
    signal, noise = (math.fsum(part) for part in zip(*sums, strict=True))
    return {
        "name": piece.stored.name,
        "scheme": label,
        "exact": piece.exact,
        "shape": list(piece.stored.shape),
        "reason": piece.reason,
        "bytes_before": piece.stored.nbytes,
        "bytes_after": sum(nbytes for nbytes, _ in written.values()),
        "sqnr_db": decibels(signal, noise),
        "tensors": {
            name: {"dtype": str(dtype).removeprefix("torch."), "shape": list(shape), "sha256": written[name][1]}
            for name, (dtype, shape) in outputs.items()
        },
    }


def decibels(signal: float, noise: float) -> float | None:
    """Signal to noise in dB; None where nothing was lost (JSON has no infinity)."""
    return 10 * math.log10(signal / noise) if noise > 0 and signal > 0 else None


def build(
    source: Source, model: Skeleton, target: Target, weights: list[dict[str, Any]], start: float
) -> dict[str, Any]:
    """The whole report; start: `time.perf_counter()` at the beginning."""
    before, after = (sum(row[key] for row in weights) for key in ("bytes_before", "bytes_after"))
    seconds = time.perf_counter() - start
    return {
        "format": "unicorn-quantization-report",
        "version": VERSION,
        "source": source.name,
        "written_as": target.name,
        "recipe": model.recipe.to_dict(),
        "notes": [*source.notes, *_notes(source, weights)],
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


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _notes(source: Source, weights: list[dict[str, Any]]) -> list[str]:
    """What the user should know: which stored types could not be kept."""
    changed: Counter[tuple[str, str, bool]] = Counter()
    for row in weights:
        stored = source.tensors.get(row["name"])  # None: experts, whose float weights are stacked
        if stored is not None and stored.type_name and row["scheme"] != FLOAT and not row["exact"]:
            changed[stored.type_name, row["scheme"], stored.scheme == row["scheme"]] += 1
    return [
        f"{count} weights stored as {stored} " + (_CLOSE if close else _AGAIN).format(scheme=scheme)
        for (stored, scheme, close), count in sorted(changed.items())
    ]


def _by_scheme(weights: list[dict[str, Any]]) -> dict[str, int]:
    schemes = sorted({row["scheme"] for row in weights})
    return {scheme: sum(row["bytes_after"] for row in weights if row["scheme"] == scheme) for scheme in schemes}


def versions() -> dict[str, str]:
    """Versions of what decides about the bytes."""
    return {name: version(name) for name in ("unicorn-backend", "torch", "transformers")}
