"""bitsandbytes checkpoints: what NF4, its quantized scales and LLM.int8() rows stand for, computed here anew."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from unicorn_backend import quantize_checkpoint, verify
from unicorn_backend.errors import CheckpointError, OptionError, QuantizationError
from unicorn_backend.formats import bitsandbytes
from unicorn_backend.formats.safetensors import folder_tensors
from unicorn_backend.layouts import W4_ZERO, dequantize, unpack_w4g32
from unicorn_backend.models import TINY
from unicorn_backend.quantize import stream
from unicorn_backend.quantize.source import open_source

# Published with QLoRA (Dettmers et al. 2023, appendix E).
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
UP, DOWN = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"


def four_bits(
    name: str, weight: torch.Tensor, block: int, nested: bool
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(the tensors that stand for a weight, the values that these stand for)."""
    blocks = torch.nn.functional.pad(weight.float().flatten(), (0, -weight.numel() % block)).view(-1, block)
    absmax = blocks.abs().amax(1)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": list(weight.shape)}
    tensors = {f"{name}.quant_map": NF4.clone(), f"{name}.absmax": absmax}
    if nested:
        offset, table = float(absmax.mean()), torch.linspace(-1, 1, 256) ** 3
        rest = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % 256)).view(-1, 256)
        outer = rest.abs().amax(1)
        bytes_ = (rest / outer[:, None])[..., None].sub(table).abs().argmin(-1)
        absmax = ((table[bytes_] * outer[:, None]).flatten() + offset)[: len(absmax)]
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        tensors[f"{name}.absmax"] = bytes_.flatten()[: len(absmax)].to(torch.uint8)
        tensors |= {f"{name}.nested_absmax": outer, f"{name}.nested_quant_map": table}
    q = torch.bucketize(blocks / absmax[:, None], (NF4[1:] + NF4[:-1]) / 2)
    values = (NF4[q] * absmax[:, None]).flatten()[: weight.numel()].view(weight.shape)
    flat = q.flatten()[: weight.numel()].to(torch.uint8)
    tensors[name] = (flat[0::2] << 4 | flat[1::2])[:, None]
    text = json.dumps(state).encode()
    tensors[f"{name}.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
    return tensors, values


def int8(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    scales = weight.float().abs().amax(1)
    q = (weight.float() * 127 / scales[:, None]).round().to(torch.int8)
    tensors = {name: q, f"{name.removesuffix('weight')}SCB": scales}
    tensors[f"{name.removesuffix('weight')}weight_format"] = torch.tensor(0, dtype=torch.uint8)
    return tensors, q.float() * (scales * (1.0 / 127.0))[:, None]


def write(folder: Path, quantize: Any, **config: Any) -> dict[str, torch.Tensor]:
    """The embedded model with its linears quantized; returns {name: values}."""
    folder.mkdir()
    for path in TINY.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copy(path, folder)
    tensors, values = load_file(TINY / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        stored, values[name] = quantize(name, tensors.pop(name))
        tensors |= stored
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", **config}
    (folder / "config.json").write_text(json.dumps(settings))
    return values


def nf4(folder: Path, nested: bool = False, block: int = 64) -> dict[str, torch.Tensor]:
    config = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": nested}
    return write(folder, lambda name, weight: four_bits(name, weight, block, nested), **config)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bitsandbytes") / "nf4"
    nf4(folder, nested=True)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A checkpoint with quantized scales, to be changed."""
    return shutil.copytree(written, tmp_path / "nf4")


def decibels(signal: torch.Tensor, noise: torch.Tensor) -> float:
    return float(10 * torch.log10(signal.double().square().sum() / noise.double().square().sum()))


@pytest.mark.parametrize(("nested", "block"), [(False, 64), (True, 64), (True, 4096)])
def test_nf4_keeps_its_integers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nested: bool, block: int) -> None:
    """Every index as stored; table and scales rounded, by 46.5 dB of normally distributed weights."""
    monkeypatch.setattr(stream, "BLOCK_BYTES", 16384)
    values = nf4(tmp_path / "nf4", nested, block)
    result = quantize_checkpoint(tmp_path / "nf4", tmp_path / "out")
    assert verify(tmp_path / "out") == []
    assert result["notes"] == [
        f"{len(values)} weights stored as NF4 kept their integers in w4n32, "
        "with its rounding of table and scales (sqnr_db)"
    ]
    rows = {row["name"]: row for row in result["weights"]}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    stored = load_file(tmp_path / "nf4/model.safetensors")
    for name, expected in values.items():
        packed = loaded.get_submodule(name.removesuffix(".weight")).packed
        index, _ = unpack_w4g32(packed[0], packed[1], *expected.shape)
        pairs = (index + W4_ZERO).flatten().view(-1, 2).to(torch.uint8)
        assert torch.equal(pairs[:, :1] << 4 | pairs[:, 1:], stored[name])
        sqnr = decibels(expected, expected - dequantize(packed, *expected.shape))
        assert (rows[name]["scheme"], rows[name]["exact"]) == ("w4n32", False)
        assert sqnr == pytest.approx(rows[name]["sqnr_db"], abs=1e-2) and (45 if block == 64 else 42) < sqnr < 48
    float_model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    float_model.load_state_dict(values, strict=False)
    ids = torch.tensor([[2, 17, 900, 41, 5, 77, 1200]])
    with torch.no_grad():
        logits, wanted = loaded(ids).logits.float(), float_model(ids).logits
    assert float((logits - wanted).norm() / wanted.norm()) < 0.03


def test_the_table_of_nf4() -> None:
    table, factor = bitsandbytes.nearest_table(NF4)
    assert table.tolist() == [-112, -78, -59, -44, -32, -21, -10, 0, 9, 18, 28, 38, 49, 63, 81, 112]
    assert decibels(NF4, NF4 - table / factor) == pytest.approx(49.58, abs=0.01)


def test_rules_and_other_formats_quantize_again(tmp_path: Path) -> None:
    """From the values to fp32, as no other scheme has the table."""
    values = nf4(tmp_path / "nf4", nested=True)
    result = quantize_checkpoint(tmp_path / "nf4", tmp_path / "out", rules={"up_proj": "w8c", "down_proj": None})
    rows = {row["name"]: row for row in result["weights"]}
    assert (rows[UP]["scheme"], rows[DOWN]["scheme"]) == ("w8c", "float") and rows[UP]["sqnr_db"] > 35
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")[DOWN], values[DOWN].bfloat16())
    result = quantize_checkpoint(tmp_path / "nf4", tmp_path / "gguf", "hybrid", format="gguf")
    assert {row["scheme"] for row in result["weights"] if row["name"].endswith("up_proj.weight")} == {"IQ4_NL"}
    again = open_source(tmp_path / "gguf/model.gguf").tensors[UP].read().view(values[UP].shape)
    assert 18 < decibels(values[UP], values[UP] - again) < 30
    assert any("NF4 were dequantized and quantized again to IQ4_NL" in note for note in result["notes"])


def test_int8_is_exact(tmp_path: Path) -> None:
    values = write(tmp_path / "int8", int8, load_in_8bit=True)
    result = quantize_checkpoint(tmp_path / "int8", tmp_path / "out")
    assert result["notes"] == []
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, expected in values.items():
        packed = loaded.get_submodule(name.removesuffix(".weight")).packed
        assert torch.equal(dequantize(packed, *expected.shape), expected)


@pytest.mark.parametrize("k", [24, 32, 96])
def test_rows_that_begin_inside_a_block(tmp_path: Path, k: int) -> None:
    weight = torch.randn(48, k)
    tensors, values = four_bits("a.weight", weight, 64, nested=True)
    save_file(tensors, tmp_path / "model.safetensors")
    stored = bitsandbytes.merge(folder_tensors(tmp_path))["a.weight"]
    assert stored.scheme == (None if k == 24 else "w4n32")
    assert torch.equal(stored.rows(16, 48), values[16:48]) and torch.equal(stored.read(5, 77), values.flatten()[5:77])
    if k > 24:
        again = dequantize(stored.packed_rows(16, 48), 32, k)
        assert 45 < decibels(values[16:48], values[16:48] - again) < 48


def state(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


STATE = f"{UP}.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{UP}.absmax"), "has no .*up_proj.weight.absmax beside it"),
        (lambda t: t.pop(f"{UP}.nested_absmax"), "has no .*nested_absmax beside it"),
        (lambda t: t.pop(f"{UP}.quant_map"), "has no .*quant_map beside it"),
        (lambda t: t.update({f"{UP}.quant_map": NF4[:8].clone()}), "quant_map' has 8 values, not 16"),
        (lambda t: t.update({f"{UP}.quant_map": NF4 * torch.inf}), "NaN or Inf"),
        (lambda t: t.update({f"{UP}.quant_map": NF4 * 2}), "outside of -1..1"),
        (lambda t: t.update({f"{UP}.absmax": t[f"{UP}.absmax"][1:].clone()}), "scales, not one for each 64"),
        (lambda t: t.update({f"{UP}.absmax": t[f"{UP}.absmax"].long()}), "is torch.int64, not"),
        (lambda t: t.update({UP: t[UP][1:].clone()}), "bytes, not .* in 4 bits"),
        (lambda t: t.update({STATE: state("[]")}), "is no JSON object"),
        (lambda t: t.update({STATE: state("{")}), "is no JSON"),
        (lambda t: t.update({STATE: state('{"shape": [-1, 2]}')}), "not two sizes"),
        (lambda t: t.update({STATE: state('{"shape": [4, 9], "blocksize": 0}')}), "blocksize 0, known are 32"),
        (lambda t: t.update({STATE: state('{"shape": [1e9, 9], "blocksize": 64}')}), "not two sizes"),
        (lambda t: t.update({f"{UP}.nested_absmax": torch.full_like(t[f"{UP}.nested_absmax"], 3e38)}), "NaN or Inf"),
    ],
)
def test_unusable_weights(folder: Path, tmp_path: Path, change: Any, message: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((CheckpointError, QuantizationError), match=message) as caught:
        quantize_checkpoint(folder, tmp_path / "out")
    assert "model.safetensors" in str(caught.value) and "up_proj" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "config", [[], "x", 3, {"quant_method": None}, {"quant_method": ["x"]}, {"quant_method": "awq"}, {}]
)
def test_hostile_quantization_config(folder: Path, tmp_path: Path, config: Any) -> None:
    """An error that names the file, or, for an empty one, the tensors that then make no model."""
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | {"quantization_config": config}
    path.write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"config\.json|quantized already|has shape"):
        quantize_checkpoint(folder, tmp_path / "out")


def test_calibration_of_quantized_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"calibration.*bitsandbytes"):
        quantize_checkpoint(folder, tmp_path / "out", calibration=__file__)
