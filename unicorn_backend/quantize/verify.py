"""`unicorn verify`: are the files of a quantized checkpoint what its report says, to the last byte?"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from unicorn_backend.errors import CheckpointError
from unicorn_backend.formats.gguf import read_header
from unicorn_backend.formats.safetensors import StoredTensor, folder_tensors, sha256_of_range
from unicorn_backend.quantize import report


def verify(folder: str | Path, *, progress: bool = False) -> list[str]:
    """What is wrong with a checkpoint that `quantize_checkpoint` wrote, one line each; empty if nothing is.

    CheckpointError if it cannot be checked: no report, or files that are cut or damaged beyond reading.
    """
    folder = Path(folder)
    expected = _expected(folder)
    stored = _stored(folder)
    problems = [f"{stored[name].file}: tensor {name!r} is not in the report" for name in stored if name not in expected]
    total = sum(tensor.nbytes for tensor in stored.values())
    with tqdm(total=total, desc="Verifying", unit="B", unit_scale=True, disable=not progress) as bar:
        for name, entry in expected.items():
            tensor = stored.get(name)
            if tensor is None:
                problems.append(f"{folder}: tensor {name!r} of the report is in no file")
                continue
            problems.extend(_compare(tensor, entry))
            bar.update(tensor.nbytes)
    return problems


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a checkpoint. CheckpointError if there is none, or it is damaged or newer."""
    path = folder / report.NAME
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing; only `unicorn quantize` writes one") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    version = data.get("version") if isinstance(data, dict) else None
    if version != report.VERSION:
        raise CheckpointError(f"{path}: version {version!r}, this unicorn_backend reads {report.VERSION}")
    return dict(data)


def _expected(folder: Path) -> dict[str, dict[str, Any]]:
    """{tensor name: its dtype, shape and checksum}."""
    data = read_report(folder)
    try:
        return {name: dict(entry) for row in data["weights"] for name, entry in row["tensors"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{folder / report.NAME}: damaged: {error!r}") from error


def _stored(folder: Path) -> Mapping[str, StoredTensor]:
    """Every tensor in the files; those of a GGUF file as the bytes of their rows."""
    path = folder / "model.gguf"
    if not path.exists():
        return folder_tensors(folder)
    tensors = read_header(path).tensors.values()
    rows = ((t.name, (*t.shape[:-1], t.nbytes // (t.numel // t.shape[-1])), t.offset) for t in tensors)
    return {name: StoredTensor(name, torch.uint8, shape, path, offset) for name, shape, offset in rows}


def _compare(tensor: StoredTensor, entry: dict[str, Any]) -> Iterator[str]:
    kind = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
    if kind != {key: entry.get(key) for key in kind}:
        yield f"{tensor.file}: tensor {tensor.name!r} is {kind}, the report says {entry}"
    elif checksum(tensor) != entry.get("sha256"):
        yield f"{tensor.file}: tensor {tensor.name!r} has another checksum than when it was written"


def checksum(tensor: StoredTensor) -> str:
    """SHA-256 of the bytes of a stored tensor."""
    return sha256_of_range(tensor.file, tensor.offset, tensor.nbytes)
