"""What lies beside the weights: config, tokenizer and licence files of the source, the card, the report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from unicorn_backend import table
from unicorn_backend.quantize import report
from unicorn_backend.quantize.skeleton import Skeleton
from unicorn_backend.quantize.source import Source

# Weights in any format, and what is written anew.
_NOT_COPIED = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".tflite"
)  # fmt: skip
_REPLACED = ("config.json", "README.md", report.NAME)
_FOLDERS = ("additional_chat_templates",)

GEMMA_TERMS = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"


def write_beside(folder: Path, source: Source, model: Skeleton, result: dict[str, Any]) -> None:
    """Everything but the weights, into `folder`."""
    copy_side_files(source.folder, folder)
    _write_config(folder, source, model)
    write_json(folder / report.NAME, result)
    notice = folder / "NOTICE"
    licence = source_card(source.folder).get("license")
    model_card(source, result).save(folder / "README.md")
    if licence == "gemma" and not notice.exists():
        notice.write_text(GEMMA_TERMS + "\n", encoding="utf-8")


def copy_side_files(source: Path, folder: Path) -> None:
    """Tokenizer, processor, generation settings, templates, licences; no weights, no index of shards."""
    for path in sorted(source.iterdir()):
        if path.is_dir() and path.name in _FOLDERS:
            shutil.copytree(path, folder / path.name)
        hidden = path.name.startswith(".") or path.name.endswith((".index.json", *_NOT_COPIED))
        if path.is_file() and not hidden and path.name not in _REPLACED:
            shutil.copyfile(path, folder / path.name)


def _write_config(folder: Path, source: Source, model: Skeleton) -> None:
    """The source's config.json as it is, with the recipe, the class and the dtype that loading needs."""
    from unicorn_backend.integration.hf_quantizer import UnicornConfig

    path = source.folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else source.config.to_dict()
    config.pop("torch_dtype", None)
    config["dtype"] = str(source.dtype).removeprefix("torch.")
    config["architectures"] = [type(model.model).__name__]
    config["quantization_config"] = UnicornConfig(model.recipe).to_dict()
    write_json(folder / "config.json", config)


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def model_card(source: Source, result: dict[str, Any]) -> ModelCard:
    """README.md: what it was made from, how, and under whose terms."""
    data = source_card(source.folder)
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


def source_card(folder: Path) -> dict[str, Any]:
    """The front matter of the source's README.md, {} if there is none that can be read."""
    path = folder / "README.md"
    if not path.is_file():
        return {}
    try:
        data: dict[str, Any] = ModelCard.load(path).data.to_dict()
    except (ValueError, yaml.YAMLError):
        return {}
    return data
