"""Write benchmarks/results/quality-tiny.json: what each recipe changes, against the bf16 model.

Only on the embedded model, the one trained model at hand: on random weights these numbers mean nothing.

    python benchmarks/quality.py
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from transformers.utils import logging

import unicorn_backend
from unicorn_backend import measure, models
from unicorn_backend.quantize.quality import compare

RESULT = Path(__file__).parent / "results" / "quality-tiny.json"
TOKENS = 16384


def main() -> None:
    logging.disable_progress_bar()
    ids, reference = models.sample_ids(TOKENS), models.load()
    rows: list[dict[str, Any]] = []
    for recipe in unicorn_backend.recipes():
        model = unicorn_backend.quantize(models.load(), recipe=recipe)
        quality = dataclasses.asdict(compare(model, reference, ids))
        rows.append({"recipe": recipe, "model_bytes": measure.model_bytes(model), **quality})
        print(recipe, quality)
    RESULT.parent.mkdir(exist_ok=True)
    result = {"schema": 1, "model": "tiny", "text": "WikiText-2 test", "rows": rows, "provenance": measure.provenance()}
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
