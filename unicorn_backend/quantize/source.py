"""Where a checkpoint comes from: a folder, the hub, a GGUF file, or a name of this package. No weight is read here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig

from unicorn_backend import models
from unicorn_backend.errors import CheckpointError
from unicorn_backend.formats import bitsandbytes, compressed_tensors, gguf_model
from unicorn_backend.formats.nonsense import NONSENSE
from unicorn_backend.formats.safetensors import StoredTensor, folder_tensors

DOWNLOADED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.md", "LICENSE*", "NOTICE*", "USE_POLICY*")

# Weights in any format, and what is written anew.
_NOT_COPIED = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".tflite"
)  # fmt: skip
_REPLACED = ("config.json", "README.md", "quantization_report.json")
_FOLDERS = ("additional_chat_templates",)
# quant_method -> what makes one tensor of those that a quantized weight is stored in.
_MERGED = {compressed_tensors.METHOD: compressed_tensors.merge, bitsandbytes.METHOD: bitsandbytes.merge}


@dataclass(frozen=True)
class Source:
    """A checkpoint to quantize; `name` is what the user called it.

    folder: where the tokenizer and the like are, None if a GGUF file has them inside.
    tensors: by the name under which transformers would find them in safetensors files.
    method: the `quant_method` that they are stored with in a folder, None for floats.
    """

    name: str
    config: Any
    dtype: torch.dtype
    tensors: Mapping[str, StoredTensor]
    folder: Path | None = None
    gguf: Path | None = None
    notes: tuple[str, ...] = field(default=())
    method: str | None = None

    @property
    def place(self) -> Path:
        """What errors about the whole checkpoint name."""
        path = self.folder or self.gguf
        assert path is not None
        return path

    def kept_schemes(self) -> dict[str, str]:
        """{module name: scheme} of the weights that are stored quantized and can stay as they are."""
        stored = ((name, tensor.scheme) for name, tensor in self.tensors.items())
        return {name.removesuffix(".weight"): scheme for name, scheme in stored if scheme is not None}

    def without_close(self) -> Source:
        """Weights that no scheme holds to the bit are read as floats: for formats that know our schemes' own tables."""
        tensors = {name: tensor if tensor.exact else tensor.dequantized() for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors)

    @property
    def memory_bytes(self) -> int:
        """Bytes of the model in its dtype."""
        return sum(tensor.numel for tensor in self.tensors.values()) * self.dtype.itemsize

    def config_dict(self) -> dict[str, Any]:
        """config.json."""
        if self.folder is not None:
            return dict(json.loads((self.folder / "config.json").read_text(encoding="utf-8")))
        config: dict[str, Any] = json.loads(self.config.to_json_string())
        return config

    def write_beside(self, folder: Path) -> None:
        """Tokenizer, processor, generation settings, templates, licences, into `folder`."""
        if self.folder is not None:
            copy_side_files(self.folder, folder)
        else:
            assert self.gguf is not None
            gguf_model.write_tokenizer(self.gguf, folder)


def open_source(name: str | Path) -> Source:
    """Find the checkpoint and read its headers. CheckpointError for what is missing or damaged."""
    path = find(name)
    if path.suffix == ".gguf":
        return _open_gguf(str(name), path)
    tensors = folder_tensors(path)
    config = read_config(path)
    _check_layers(path, config, len(tensors))
    method = _method(path, config)
    if method in _MERGED:
        del config.quantization_config
        tensors = _MERGED[method](tensors)
    elif method is not None:
        raise CheckpointError(f"{path}: is quantized already ({method}); give the float checkpoint")
    return Source(str(name), config, dtype_of(config, tensors), tensors, folder=path, method=method)


def _check_layers(path: Path, config: Any, count: int) -> None:
    """Before a model of a thousand million layers is built."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if not isinstance(layers, int) or layers > count:
        raise CheckpointError(f"{path / 'config.json'}: num_hidden_layers is {layers!r}, with {count} tensors")


def _method(path: Path, config: Any) -> str | None:
    """`quant_method` of config.json, None for a float checkpoint."""
    found = getattr(config, "quantization_config", None)
    if not found:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else None
    if not isinstance(method, str):
        raise CheckpointError(f"{path / 'config.json'}: quantization_config says no quant_method: {str(found)[:100]}")
    return method


def _open_gguf(name: str, path: Path) -> Source:
    """A GGUF file; a config.json beside it counts more than what the file says about the model."""
    header = gguf_model.read_header(path)
    folder = path.parent if (path.parent / "config.json").exists() else None
    config = read_config(folder) if folder else gguf_model.read_config(header)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else gguf_model.dtype_of(header)
    return Source(name, config, dtype, gguf_model.named_tensors(header, config), folder=folder, gguf=path)


def find(name: str | Path) -> Path:
    """Folder or GGUF file of a checkpoint, downloaded if it is on the hub (HF_HOME and HF_HUB_OFFLINE count).

    On the hub: "owner/name", or "owner/name/file.gguf".
    """
    if str(name) == "tiny":
        return models.TINY
    path = Path(name)
    if path.exists():
        return models.only_gguf(path) or path
    try:
        if path.suffix == ".gguf" and len(path.parts) > 2 and not path.is_absolute():
            return Path(hf_hub_download("/".join(path.parts[:2]), "/".join(path.parts[2:])))
        return Path(snapshot_download(str(name), allow_patterns=list(DOWNLOADED)))
    except HFValidationError as error:
        raise CheckpointError(f"{name}: no such file or folder, and not the form of a hub id (owner/name)") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{name}: no such file or folder, not in the cache, and the hub cannot be reached"
        ) from error
    except HfHubHTTPError as error:
        raise CheckpointError(f"{name}: no such file or folder, and the hub answers: {error}") from error


def read_config(folder: Path) -> Any:
    """The transformers config. CheckpointError if there is none that transformers can read."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json; is it a folder written by save_pretrained?")
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, *NONSENSE) as error:
        raise CheckpointError(f"{folder / 'config.json'}: transformers cannot read it: {error}") from error


def dtype_of(config: Any, tensors: Mapping[str, StoredTensor]) -> torch.dtype:
    """What `from_pretrained(..., dtype="auto")` takes: the config's dtype, else that of the first float tensor."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    for tensor in tensors.values():
        if tensor.dtype.is_floating_point:
            return tensor.dtype
    raise CheckpointError(f"{next(iter(tensors.values())).file}: holds no float tensor")


def copy_side_files(source: Path, folder: Path) -> None:
    """Everything beside the weights: no weights in another format, no index of shards, nothing written anew."""
    for path in sorted(source.iterdir()):
        if path.is_dir() and path.name in _FOLDERS:
            shutil.copytree(path, folder / path.name)
        hidden = path.name.startswith(".") or path.name.endswith((".index.json", *_NOT_COPIED))
        if path.is_file() and not hidden and path.name not in _REPLACED:
            shutil.copyfile(path, folder / path.name)
