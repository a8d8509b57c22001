"""compressed-tensors in and out: the bits are those of the compressed-tensors package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from unicorn_backend import quantize_checkpoint, verify
from unicorn_backend.errors import CheckpointError
from unicorn_backend.formats.compressed_tensors import pack_words, unpack_words
from unicorn_backend.layouts import dequantize
from unicorn_backend.models import TINY
from unicorn_backend.quantize import stream

UP, Q = "model.layers.1.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(stream, "BLOCK_BYTES", 16384)
    quantize_checkpoint(TINY, tmp_path / "ct", format="compressed-tensors")
    return tmp_path / "ct"


@pytest.mark.parametrize("bits", [4, 8])
def test_words(bits: int) -> None:
    q = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (5, 64), dtype=torch.int8)
    assert torch.equal(unpack_words(pack_words(q, bits), bits), q)
    package = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    assert torch.equal(pack_words(q, bits), package.pack_to_int32(q, bits))


def values(tensors: dict[str, torch.Tensor], name: str, bits: int) -> torch.Tensor:
    q, scale = unpack_words(tensors[f"{name}_packed"], bits), tensors[f"{name}_scale"].float()
    return q.float() * scale.repeat_interleave(q.shape[1] // scale.shape[1], dim=1)


def test_out(written: Path) -> None:
    assert verify(written) == []
    tensors, original = load_file(written / "model.safetensors"), load_file(TINY / "model.safetensors")
    report = {row["name"]: row for row in json.loads((written / "quantization_report.json").read_text())["weights"]}
    for name, bits, decibels in ((UP, 4, 20), (Q, 8, 40)):
        w, ours = original[name].double(), values(tensors, name, bits).double()
        sqnr = float(10 * torch.log10(w.square().sum() / (w - ours).square().sum()))
        assert sqnr == pytest.approx(report[name]["sqnr_db"], abs=1e-3) and sqnr > decibels
        assert tensors[f"{name}_scale"].dtype == torch.bfloat16 and tensors[f"{name}_shape"].tolist() == list(w.shape)
    assert torch.equal(tensors["model.embed_tokens.weight"], original["model.embed_tokens.weight"])


def test_transformers_loads_it(written: Path) -> None:
    pytest.importorskip("compressed_tensors")
    model = AutoModelForCausalLM.from_pretrained(written).eval()
    original = AutoModelForCausalLM.from_pretrained(TINY, dtype="auto").eval()
    ids = torch.tensor([[2, 17, 900, 41, 5, 77, 1200]])
    with torch.no_grad():
        logits, wanted = model(ids).logits.float(), original(ids).logits.float()
    assert float((logits - wanted).norm() / wanted.norm()) < 0.1
    tensors = load_file(written / "model.safetensors")
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight.float(), values(tensors, UP, 4).bfloat16().float())


def test_in_again_keeps_every_value(written: Path, tmp_path: Path) -> None:
    result = quantize_checkpoint(written, tmp_path / "back")
    rows = {row["name"]: row for row in result["weights"]}
    assert (rows[UP]["scheme"], rows[UP]["exact"]) == ("w4g32", True)
    assert (rows[Q]["scheme"], rows[Q]["exact"]) == ("w8c", True)
    assert result["notes"] == []
    tensors, back = load_file(written / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    for name, bits in ((UP, 4), (Q, 8)):
        packed = [back[f"{name}_packed"], back[f"{name}_scale"]]
        expected = values(tensors, name, bits)
        assert torch.equal(dequantize(packed, *expected.shape), expected)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert model.model.layers[1].mlp.up_proj.scheme == "w4g32"


def edit(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_larger_groups_and_plain_int8(written: Path, tmp_path: Path) -> None:
    """Groups of 128 are four groups of 32; "int-quantized" weights are int8; INT8 in groups is requantized."""

    def change(t: dict[str, torch.Tensor]) -> None:
        t[f"{UP}_scale"] = t[f"{UP}_scale"][:, ::4].contiguous()
        t[Q] = unpack_words(t.pop(f"{Q}_packed"), 8)
        t.pop(f"{Q}_shape")
        grouped = Q.replace("q_proj", "k_proj")
        t[f"{grouped}_scale"] = t[f"{grouped}_scale"].repeat(1, 2)

    edit(written, change)
    result = quantize_checkpoint(written, tmp_path / "back")
    rows = {row["name"]: row for row in result["weights"]}
    assert rows[UP]["exact"] and rows[Q]["exact"] and rows[UP]["scheme"] == "w4g32"
    assert result["notes"] == ["1 weights stored as INT8 in groups of 128 were dequantized and quantized again to w8c"]
    tensors, back = load_file(written / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    expected = values(tensors, UP, 4)
    assert torch.equal(dequantize([back[f"{UP}_packed"], back[f"{UP}_scale"]], *expected.shape), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{UP}_scale"), "has no .*weight_scale"),
        (lambda t: t.pop(f"{UP}_shape"), "has no .*weight_shape"),
        (lambda t: t.update({f"{UP}_shape": torch.tensor([3, 5])}), "is no INT4 or INT8 weight"),
        (lambda t: t.update({f"{UP}_shape": torch.tensor([1024, -1])}), "is no INT4 or INT8 weight"),
        (lambda t: t.update({f"{UP}_scale": torch.ones(1024, 7)}), "weight_scale.*has torch.float32"),
        (lambda t: t.update({f"{UP}_zero_point": torch.ones(1024, 8)}), "only symmetric"),
    ],
)
def test_unusable_weights(written: Path, tmp_path: Path, change: Any, message: str) -> None:
    edit(written, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        quantize_checkpoint(written, tmp_path / "out")
    assert "model.safetensors" in str(caught.value) and "up_proj" in str(caught.value)
