"""Where a checkpoint comes from: a folder, the hub, or a name of this package. Nothing is loaded here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig

from unicorn_backend import models
from unicorn_backend.errors import CheckpointError
from unicorn_backend.formats.safetensors import StoredTensor, folder_tensors

DOWNLOADED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.md", "LICENSE*", "NOTICE*", "USE_POLICY*")


@dataclass(frozen=True)
class Source:
    """A float checkpoint. `folder` holds what is copied beside the weights; `name` is what the user called it."""

    name: str
    folder: Path
    config: Any
    dtype: torch.dtype
    tensors: Mapping[str, StoredTensor]
    notes: tuple[str, ...] = field(default=())


def open_source(name: str | Path) -> Source:
    """Find the checkpoint and read its headers. CheckpointError for what is missing or damaged."""
    folder = find(name)
    tensors = folder_tensors(folder)
    config = read_config(folder)
    if method := (getattr(config, "quantization_config", None) or {}).get("quant_method"):
        raise CheckpointError(f"{folder}: is quantized already ({method}); give the float checkpoint")
    return Source(str(name), folder, config, dtype_of(config, tensors), tensors)


def find(name: str | Path) -> Path:
    """The folder of a checkpoint, downloaded if it is a hub id (HF_HOME and HF_HUB_OFFLINE count)."""
    if str(name) == "tiny":
        return models.TINY
    path = Path(name)
    if path.exists():
        return path
    try:
        return Path(snapshot_download(str(name), allow_patterns=list(DOWNLOADED)))
    except HFValidationError as error:
        raise CheckpointError(f"{name}: no such folder, and not the form of a hub id (owner/name)") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(f"{name}: no such folder, not in the cache, and the hub cannot be reached") from error
    except HfHubHTTPError as error:
        raise CheckpointError(f"{name}: no such folder, and the hub answers: {error}") from error


def read_config(folder: Path) -> Any:
    """The transformers config. CheckpointError if there is none that transformers can read."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json; is it a folder written by save_pretrained?")
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: transformers cannot read it: {error}") from error


def dtype_of(config: Any, tensors: Mapping[str, StoredTensor]) -> torch.dtype:
    """What `from_pretrained(..., dtype="auto")` takes: the config's dtype, else that of the first float tensor."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    for tensor in tensors.values():
        if tensor.dtype.is_floating_point:
            return tensor.dtype
    raise CheckpointError(f"{next(iter(tensors.values())).file}: holds no float tensor")
