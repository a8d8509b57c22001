"""What a format that checkpoints are written in must say, and our own format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from unicorn_backend.formats.safetensors import StoredTensor, make_header
from unicorn_backend.layouts import PARTS, ROWS, buffers_of, empty_packed
from unicorn_backend.quantize import report
from unicorn_backend.quantize.recipe import FLOAT
from unicorn_backend.quantize.schemes import quantization_noise, quantize_weight

if TYPE_CHECKING:
    from unicorn_backend.quantize.skeleton import Skeleton
    from unicorn_backend.quantize.source import Source

Declared = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
Rows = Tensor | list[Tensor]  # float rows, or rows whose stored values are kept: packed as w4g32, w8c or w8a
Encoded = tuple[str, int, Tensor]  # name of the tensor, byte offset in it, what is written there
Noise = tuple[float, float]  # sums of squares: of the weight, and of what was lost
LOSSLESS = (0.0, 0.0)


@dataclass(frozen=True)
class Place:
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """Where every byte goes. headers: the first bytes of each file; beside: small text files, by name."""

    headers: Mapping[str, bytes]
    places: Mapping[str, Place]
    beside: Mapping[str, str]


class Target(Protocol):
    """A format. Weights come in blocks of whole tiles of rows, in order."""

    name: str

    def together(self, name: str) -> int:
        """How many rows of a tensor blocks must keep together."""

    def computed(self) -> list[StoredTensor]:
        """Float tensors of the format that the checkpoint does not have."""

    def label(self, shape: tuple[int, ...], scheme: str) -> str:
        """How the format calls what a weight of this scheme becomes."""

    def outputs(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], scheme: str) -> Declared:
        """The tensors that stand for a stored tensor `name` of this dtype and shape."""

    def encode(
        self,
        name: str,
        shape: tuple[int, ...],
        scheme: str,
        first: int,
        rows: Rows,
        importance: Tensor | None = None,
    ) -> tuple[list[Encoded], Noise]:
        """The bytes of rows first, first + 1, ... of a weight (of elements, for scheme "float").

        importance: fp32 [K], for the searches of scales.
        """

    def layout(self, declared: Declared, shard_bytes: int) -> Layout:
        """The files."""

    def write_beside(self, folder: Path, source: Source, model: Skeleton, labels: Mapping[str, str]) -> None:
        """config.json, the tokenizer and what else loading needs; labels: weight -> `label`."""


class Unicorn:
    """Packed tiles in safetensors: what `save_pretrained` of a quantized model writes."""

    name = "unicorn"

    def together(self, name: str) -> int:
        return 1

    def computed(self) -> list[StoredTensor]:
        return []

    def label(self, shape: tuple[int, ...], scheme: str) -> str:
        return scheme

    def outputs(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], scheme: str) -> Declared:
        if scheme == FLOAT:
            return {name: (dtype, shape)}
        empty = empty_packed(shape[0], shape[1], scheme, "meta")
        return {key: (t.dtype, tuple(t.shape)) for key, t in zip(_buffers(name, scheme), empty, strict=True)}

    def encode(
        self,
        name: str,
        shape: tuple[int, ...],
        scheme: str,
        first: int,
        rows: Rows,
        importance: Tensor | None = None,
    ) -> tuple[list[Encoded], Noise]:
        if scheme == FLOAT:
            return copied(name, first, rows)
        packed, noise = packed_with_noise(rows, scheme, importance)
        tile = first // ROWS
        parts = zip(_buffers(name, scheme), PARTS[scheme], packed, strict=True)
        # What is not per tile (a codebook) is written once.
        return [(key, tile * t[0].nbytes, t) for key, part, t in parts if part.tiled or tile == 0], noise

    def layout(self, declared: Declared, shard_bytes: int) -> Layout:
        return sharded(declared, shard_bytes)

    def write_beside(self, folder: Path, source: Source, model: Skeleton, labels: Mapping[str, str]) -> None:
        from unicorn_backend.integration.hf_quantizer import UnicornConfig

        source.write_beside(folder)
        write_config(folder, source, model, UnicornConfig(model.recipe).to_dict())


def copied(name: str, first: int, rows: Rows) -> tuple[list[Encoded], Noise]:
    """Elements of a float tensor as they are."""
    assert isinstance(rows, Tensor)
    return [(name, first * rows.element_size(), rows)], LOSSLESS


def packed_with_noise(rows: Rows, scheme: str, importance: Tensor | None) -> tuple[list[Tensor], Noise]:
    """Rows in the packed form of `scheme`; rows that are packed already lose nothing."""
    if isinstance(rows, list):
        return rows, LOSSLESS
    packed = quantize_weight(rows, scheme, importance)
    return packed, quantization_noise(rows, packed)


def squares(x: Tensor) -> float:
    """Sum of squares, fp32 within the last dimension and fp64 above."""
    return float(x.square().sum(-1).double().sum())


def _buffers(name: str, scheme: str) -> list[str]:
    return [name.removesuffix("weight") + buffer for buffer in buffers_of(scheme)]


def sharded(declared: Declared, shard_bytes: int) -> Layout:
    """safetensors shards with an index, as transformers splits."""
    empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in declared.items()}
    split = split_torch_state_dict_into_shards(
        empty, filename_pattern="model{suffix}.safetensors", max_shard_size=shard_bytes
    )
    headers, places = {}, {}
    for file, names in split.filename_to_tensors.items():
        headers[file], offsets = make_header({name: declared[name] for name in names}, {"format": "pt"})
        places.update({name: Place(file, offset, empty[name].nbytes) for name, offset in offsets.items()})
    index = {
        "metadata": {"total_size": sum(place.nbytes for place in places.values())},
        "weight_map": {name: places[name].file for name in sorted(places)},
    }
    beside = {"model.safetensors.index.json": json.dumps(index, indent=2) + "\n"} if len(headers) > 1 else {}
    return Layout(headers, places, beside)


def write_config(folder: Path, source: Source, model: Skeleton, quantization: dict[str, Any]) -> None:
    """The source's config.json as it is, with how it is quantized, the class and the dtype that loading needs."""
    config = source.config_dict()
    config.pop("torch_dtype", None)
    config["dtype"] = str(source.dtype).removeprefix("torch.")
    config["architectures"] = [type(model.model).__name__]
    config["quantization_config"] = quantization
    report.write_json(folder / "config.json", config)
