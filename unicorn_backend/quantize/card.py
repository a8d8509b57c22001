"""README.md of a quantized checkpoint, with the terms that go with it, and the report beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from unicorn_backend import table
from unicorn_backend.quantize import report
from unicorn_backend.quantize.source import Source

GEMMA_TERMS = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"


def write_card(folder: Path, source: Source, result: dict[str, Any]) -> None:
    """The report, README.md, and the notice that goes with Gemma."""
    report.write_json(folder / report.NAME, result)
    notice = folder / "NOTICE"
    licence = source_card(source).get("license")
    model_card(source, result).save(folder / "README.md")
    if licence == "gemma" and not notice.exists():
        notice.write_text(GEMMA_TERMS + "\n", encoding="utf-8")


def model_card(source: Source, result: dict[str, Any]) -> ModelCard:
    """README.md: what it was made from, how, and under whose terms."""
    data = source_card(source)
    known = source.name if "/" in source.name and not Path(source.name).exists() else data.get("base_model")
    licence = data.get("license")
    totals = result["totals"]
    header = ModelCardData(
        base_model=known,
        license=licence,
        license_name=data.get("license_name"),
        license_link=data.get("license_link"),
        library_name="transformers",
        pipeline_tag=data.get("pipeline_tag"),
        language=data.get("language"),
        tags=["unicorn", "quantized"],
    )
    sizes = [table.size(totals[key]) for key in ("bytes_before", "bytes_after")]
    rows = "".join(f"| `{scheme}` | {table.size(size)} |\n" for scheme, size in totals["bytes_by_scheme"].items())
    text = f"""---
{header.to_yaml()}
---

# {Path(source.name).name}, quantized with unicorn_backend

Made from `{source.name}` by weight quantization, recipe `{result["recipe"]["name"]}`: {sizes[0]} to {sizes[1]}.
The weights were changed by this; nothing was trained.

| scheme | bytes |
| --- | ---: |
{rows}
```python
import unicorn_backend
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```

Scheme, signal to noise and checksum of every weight are in `{report.NAME}`; `unicorn verify` checks them.

## Terms

{_terms(source, licence)}
"""
    return ModelCard(text)


def _terms(source: Source, licence: str | None) -> str:
    if licence == "gemma":
        return (
            f"{GEMMA_TERMS}. This is a Model Derivative under those terms: whoever passes it on must pass on the terms "
            "and this notice, and the use restrictions of the Gemma Prohibited Use Policy apply."
        )
    if licence:
        return f"The licence of the original model ({licence}) applies."
    text = f"The source `{source.name}` states no licence; the terms of the original model apply."
    if source.config.model_type.startswith("gemma"):
        text += f" If its weights come from Google: {GEMMA_TERMS}."
    return text


def source_card(source: Source) -> dict[str, Any]:
    """The front matter of the source's README.md, {} if there is none that can be read."""
    path = source.folder / "README.md" if source.folder else None
    if path is None or not path.is_file():
        return {}
    try:
        data: dict[str, Any] = ModelCard.load(path).data.to_dict()
    except (ValueError, yaml.YAMLError):
        return {}
    return data
