"""Damaged files, by the hundred: an error of this package or a sound answer, and nothing else.

The mutations are drawn from fixed seeds, so a failure repeats.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from tests.formats.test_bitsandbytes import four_bits
from unicorn_backend import quantize_checkpoint, verify
from unicorn_backend.errors import CheckpointError, UnicornError
from unicorn_backend.formats import gguf, safetensors
from unicorn_backend.models import TINY
from unicorn_backend.quantize.source import open_source

FUZZ = settings(
    max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SLOW = settings(FUZZ, max_examples=60)


def micro(folder: Path) -> Path:
    """A Gemma 3 of 20 thousand parameters, with a tokenizer."""
    config = Gemma3TextConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16, sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    Gemma3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro(tmp_path_factory.mktemp("micro"))


@pytest.fixture(scope="module")
def blocks(model: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("blocks") / "out"
    quantize_checkpoint(model, folder, "q4", format="gguf")
    return (folder / "model.gguf").read_bytes()


@pytest.fixture(scope="module")
def quantized(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same in the formats of others."""
    folder = tmp_path_factory.mktemp("quantized")
    quantize_checkpoint(model, folder / "compressed-tensors", format="compressed-tensors")
    shutil.copytree(model, folder / "bitsandbytes")
    tensors = load_file(model / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors |= four_bits(name, tensors.pop(name), 64, nested="mlp" in name)[0]
    save_file(tensors, folder / "bitsandbytes/model.safetensors", {"format": "pt"})
    set_config(folder / "bitsandbytes", "quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True})
    return {path.name: path for path in folder.iterdir()}


def set_config(folder: Path, key: str, value: Any) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {key: value}), encoding="utf-8")


@st.composite
def damages(draw: Any) -> Callable[[bytes, int], bytes]:
    """A change of a file, aimed at its first `head` bytes: bits, runs, numbers, cuts, doubled parts."""
    seed, kind = draw(st.integers(0, 2**32)), draw(st.sampled_from(["bit", "run", "number", "cut", "double", "many"]))

    def damage(data: bytes, head: int) -> bytes:
        rng, changed = random.Random(seed), bytearray(data)
        at = rng.randrange(min(head, len(data)))
        if kind == "bit":
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == "run":
            changed[at : at + 16] = rng.randbytes(16)
        elif kind == "number":
            value = rng.choice([0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1, len(data), rng.randrange(2**64)])
            changed[at : at + 8] = value.to_bytes(8, "little")
        elif kind == "cut":
            del changed[at:]
        elif kind == "double":
            changed[at:at] = changed[at : at + rng.randrange(1, 200)]
        else:
            for _ in range(20):
                changed[rng.randrange(min(head, len(data)))] = rng.randrange(256)
        return bytes(changed)

    return damage


def header_bytes(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


@FUZZ
@given(damage=damages())
def test_safetensors(model: Path, tmp_path: Path, damage: Any) -> None:
    """What we accept, the safetensors package accepts too, with the same values."""
    data = (model / "model.safetensors").read_bytes()
    path = tmp_path / "model.safetensors"
    path.write_bytes(damage(data, header_bytes(data)))
    try:
        tensors = safetensors.read_header(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        return
    for tensor in tensors.values():
        assert tensor.offset + tensor.nbytes <= path.stat().st_size
        assert len(tensor.read()) == tensor.numel
    try:
        loaded = load_file(path)
    except SafetensorError:
        return  # stricter than we are, about alignment of the header and the like
    assert loaded.keys() == tensors.keys()


@FUZZ
@given(damage=damages())
def test_gguf_header(blocks: bytes, tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(damage(blocks, 40_000))
    try:
        header = gguf.read_header(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        return
    for tensor in header.tensors.values():
        assert tensor.offset + tensor.nbytes <= path.stat().st_size
        assert len(tensor.read()) == tensor.numel


@SLOW
@given(damage=damages())
def test_gguf_model(blocks: bytes, tmp_path: Path, damage: Any) -> None:
    """Metadata that transformers reads: a config, or an error that names the file."""
    path = tmp_path / "model.gguf"
    path.write_bytes(damage(blocks, 2000))
    try:
        open_source(path)
    except UnicornError as error:
        assert "model.gguf" in str(error)


@SLOW
@given(damage=damages())
def test_checkpoint(model: Path, tmp_path: Path, damage: Any) -> None:
    """The whole run: no target for a damaged source, or one that is what its report says."""
    source = fresh_copy(model, tmp_path)
    data = (model / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(damage(data, len(data)))
    unharmed(source, tmp_path / "out")


FORMATS = st.sampled_from(["compressed-tensors", "bitsandbytes"])


@SLOW
@given(kind=FORMATS, damage=damages())
def test_quantized_checkpoint(quantized: dict[str, Path], tmp_path: Path, kind: str, damage: Any) -> None:
    """Its headers, tables, scales, shapes and JSON: an error, or what the report says."""
    source = fresh_copy(quantized[kind], tmp_path)
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(damage(data, len(data)))
    unharmed(source, tmp_path / "out")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES = ["quant_method", "format", "config_groups", "ignore", "load_in_4bit", "bnb_4bit_quant_type", "recipe"]
METHODS = st.sampled_from(["compressed-tensors", "bitsandbytes", "unicorn", "gptq", "mxfp4"]) | JSON
QUANTIZATION = JSON | st.fixed_dictionaries({"quant_method": METHODS}, optional=dict.fromkeys(NAMES[1:], JSON))


@SLOW
@given(kind=FORMATS, value=QUANTIZATION)
def test_quantization_config(quantized: dict[str, Path], tmp_path: Path, kind: str, value: Any) -> None:
    source = fresh_copy(quantized[kind], tmp_path)
    set_config(source, "quantization_config", value)
    unharmed(source, tmp_path / "out")


@SLOW
@given(data=st.data())
def test_config(model: Path, tmp_path: Path, data: Any) -> None:
    """Any value of config.json replaced by any other."""
    source = fresh_copy(model, tmp_path)
    keys = sorted(json.loads((source / "config.json").read_text(encoding="utf-8")))
    set_config(source, data.draw(st.sampled_from(keys)), data.draw(JSON))
    unharmed(source, tmp_path / "out")


def fresh_copy(folder: Path, place: Path) -> Path:
    shutil.rmtree(place / "source", ignore_errors=True)
    return Path(shutil.copytree(folder, place / "source"))


def unharmed(source: Path, target: Path) -> None:
    """An error of this package and no target, or a target that is what its report says."""
    shutil.rmtree(target, ignore_errors=True)
    try:
        quantize_checkpoint(source, target)
    except UnicornError:
        assert not target.exists() and not target.with_name("out.partial").exists()
        return
    assert verify(target) == []


@SLOW
@given(seed=st.integers(0, 2**32))
def test_report(model: Path, tmp_path: Path, seed: int) -> None:
    """`verify` of a damaged report: problems or an error, never a pass with a checksum changed."""
    target, rng = tmp_path / "out", random.Random(seed)
    if not target.exists():
        quantize_checkpoint(model, target)
    path = target / "quantization_report.json"
    good = path.read_text(encoding="utf-8")
    report = json.loads(good)
    row = rng.choice(report["weights"])
    rng.choice([row, row["tensors"]]).pop(next(iter(row["tensors"])), None)
    row["tensors"] = rng.choice([None, [], {}, {"x": None}, {"x": {}}, 3, {next(iter(load_names(target))): {}}])
    path.write_text(json.dumps(report), encoding="utf-8")
    try:
        assert verify(target)
    except CheckpointError as error:
        assert path.name in str(error)
    finally:
        path.write_text(good, encoding="utf-8")


def load_names(folder: Path) -> list[str]:
    return sorted(safetensors.read_header(folder / "model.safetensors"))


def test_a_tensor_of_zero_elements(tmp_path: Path) -> None:
    save_file({"empty": torch.zeros(0, 3), "one": torch.ones(1)}, tmp_path / "model.safetensors")
    tensors = safetensors.read_header(tmp_path / "model.safetensors")
    assert tensors["empty"].numel == 0 and len(tensors["empty"].read()) == 0
