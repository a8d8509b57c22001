"""The strict reader: it agrees with the safetensors package on good files and names what is wrong with bad ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from unicorn_backend.errors import CheckpointError
from unicorn_backend.formats.safetensors import DTYPES, folder_tensors, make_header, read_header


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {f"{name}.{rows}": torch.ones(rows, 3).to(dtype) for rows in (1, 2) for name, dtype in DTYPES.items()}


@pytest.fixture
def path(tensors: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def test_headers_are_those_of_the_safetensors_package(tensors: dict[str, torch.Tensor], path: Path) -> None:
    header, offsets = make_header({name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}, {"format": "pt"})
    assert path.read_bytes().startswith(header)
    assert {name: tensor.offset for name, tensor in read_header(path).items()} == offsets


def test_tensors_are_those_of_the_safetensors_package(path: Path) -> None:
    loaded = load_file(path)
    for name, stored in read_header(path).items():
        assert stored.dtype == loaded[name].dtype and stored.shape == tuple(loaded[name].shape)
        assert torch.equal(stored.read().view(torch.uint8), loaded[name].flatten().view(torch.uint8))
    assert torch.equal(stored.rows(1, 2) if stored.shape[0] > 1 else stored.rows(0, 1), loaded[name][-1:])


def write(path: Path, header: Any, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(begin: int = 0, end: int = 8, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HOSTILE: dict[str, tuple[Any, bytes, str]] = {
    "no object": ([1], b"", "unreadable header"),
    "not JSON": (b"\xff" * 20, b"", "unreadable header"),
    "deep nesting": (b"[" * 100_000, b"", "unreadable header"),
    "twice": (b'{"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"w":{}}', b"", "'w' twice"),
    "entry": ({"w": 3}, b"", "tensor 'w' is not one"),
    "dtype": ({"w": entry(dtype="F12")}, bytes(8), "'w' has dtype 'F12'"),
    "dtype type": ({"w": entry(dtype=[])}, bytes(8), "'w' has dtype"),
    "negative size": ({"w": entry(shape=[-2, -1])}, bytes(8), "'w' has shape"),
    "bool size": ({"w": entry(shape=[True, 2])}, bytes(8), "'w' has shape"),
    "gigantic": ({"w": entry(shape=[2**62, 2**62])}, bytes(8), "'w' of F32"),
    "offsets": ({"w": entry(8, 0)}, bytes(8), "'w' of F32"),
    "past the end": ({"w": entry(2**40, 2**40 + 8)}, bytes(8), "'w' overlaps another or leaves a gap"),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12), "'b' overlaps"),
    "gap": ({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20), "'b' overlaps another or leaves a gap"),
    "too long": ({"a": entry(0, 8)}, bytes(9), "cut short or damaged"),
    "too short": ({"a": entry(0, 8)}, bytes(7), "cut short or damaged"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_header(tmp_path: Path, case: str) -> None:
    header, data, message = HOSTILE[case]
    write(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(tmp_path / "bad.safetensors")
    assert "bad.safetensors" in str(caught.value)


@pytest.mark.parametrize("length", [0, 1, 2**63, 2**64 - 1, 10**9])
def test_hostile_length(tmp_path: Path, length: int) -> None:
    (tmp_path / "bad.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}      ")
    with pytest.raises(CheckpointError, match="unreadable header"):
        read_header(tmp_path / "bad.safetensors")


def shards(folder: Path, places: dict[str, str]) -> None:
    for shard in set(places.values()):
        save_file({n: torch.ones(2) for n, place in places.items() if place == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_shards(tmp_path: Path) -> None:
    shards(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    assert {name: tensor.file.name for name, tensor in folder_tensors(tmp_path).items()} == {
        "a": "1.safetensors",
        "b": "2.safetensors",
    }


def test_damaged_shards(tmp_path: Path) -> None:
    shards(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    save_file({"b": torch.ones(2), "a": torch.ones(2)}, tmp_path / "2.safetensors")
    with pytest.raises(CheckpointError, match=r"'a' is in .*1\.safetensors and in .*2\.safetensors"):
        folder_tensors(tmp_path)
    save_file({"c": torch.ones(2)}, tmp_path / "2.safetensors")
    with pytest.raises(CheckpointError, match=r"2\.safetensors: has no tensor 'b'"):
        folder_tensors(tmp_path)
    (tmp_path / "2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"2\.safetensors: missing.*1 tensors"):
        folder_tensors(tmp_path)


@pytest.mark.parametrize("index", ["", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../secret"}}'])
def test_hostile_index(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        folder_tensors(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        folder_tensors(tmp_path)
