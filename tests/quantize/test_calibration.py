"""Importance from a text: what it is, that it reaches every search, and that it helps on another text."""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import Any

import pytest
import torch

from unicorn_backend import measure, quantize, quantize_checkpoint
from unicorn_backend.errors import OptionError, QuantizationError
from unicorn_backend.layouts import dequantize
from unicorn_backend.models import SAMPLE_TEXT, TINY, load_tokenizer
from unicorn_backend.quantize.calibration import importance
from unicorn_backend.quantize.schemes import SEARCHED, quantize_weight

pytestmark = pytest.mark.usefixtures("native")
LAYER = "model.layers.2.mlp.down_proj"


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    """int64 [1, 1200], in two texts: 0..599 and 600..1199."""
    text = SAMPLE_TEXT.read_text(encoding="utf-8")[:8000]
    found: torch.Tensor = load_tokenizer()(text, return_tensors="pt").input_ids[:, :1200]
    return found


def test_it_is_the_mean_square_of_the_activations(tiny: Any, ids: torch.Tensor) -> None:
    met: list[torch.Tensor] = []
    handle = tiny.get_submodule(LAYER).register_forward_hook(lambda module, inputs, output: met.append(inputs[0][0]))
    with torch.no_grad():
        tiny(input_ids=ids[:, :512], use_cache=False)
    handle.remove()
    found = importance(tiny, ids[:, :512])
    expected = met[0].double().square().mean(0)
    expected = (expected / expected.mean()).clamp_min(1e-4)
    torch.testing.assert_close(found[LAYER].double(), expected / expected.mean(), rtol=1e-4, atol=0)
    assert len(found) == 43 and not any(len(m._forward_pre_hooks) for m in tiny.modules())


@pytest.mark.parametrize("scheme", SEARCHED)
def test_less_error_in_the_output_on_another_text(tiny: Any, ids: torch.Tensor, scheme: str) -> None:
    """The error of a linear's output, where weight errors have no pattern: their squares times the mean squares."""
    known, other = importance(tiny, ids[:, :600]), importance(tiny, ids[:, 600:])
    errors = torch.zeros(2)
    for name in (LAYER, "model.layers.4.mlp.down_proj", "model.layers.1.self_attn.o_proj"):
        w = tiny.get_submodule(name).weight.detach()
        for i, columns in enumerate((None, known[name])):
            error = dequantize(quantize_weight(w, scheme, columns), *w.shape) - w.float()
            errors[i] += (error.square() * other[name]).sum() / w.float().square().sum()
    assert errors[1] < 0.99 * errors[0]


def text_file(folder: Path, size: int) -> Path:
    path = folder / "text.txt"
    path.write_text(SAMPLE_TEXT.read_text(encoding="utf-8")[:size], encoding="utf-8")
    return path


def test_from_disk_as_in_memory(tiny: Any, tmp_path: Path) -> None:
    text = text_file(tmp_path, 3000)
    result = quantize_checkpoint(TINY, tmp_path / "streamed", "q4_k_m", calibration=text)
    assert result["calibration"]["text"] == "text.txt" and len(result["calibration"]["sha256"]) == 64
    tokens = load_tokenizer()(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids
    quantize(tiny, "q4_k_m", calibration=tokens).save_pretrained(tmp_path / "saved")
    quantize_checkpoint(TINY, tmp_path / "without", "q4_k_m")
    files = [tmp_path / name / "model.safetensors" for name in ("streamed", "saved", "without")]
    assert filecmp.cmp(files[0], files[1], shallow=False) and not filecmp.cmp(files[0], files[2], shallow=False)


def test_another_text_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from unicorn_backend.quantize.output import Output

    identities: list[Any] = []
    monkeypatch.setattr(Output, "__enter__", lambda self: identities.append(self._identity) or 1 / 0)
    for size in (3000, 3100):
        with pytest.raises(ZeroDivisionError):
            quantize_checkpoint(TINY, tmp_path / "out", calibration=text_file(tmp_path, size))
    assert identities[0] != identities[1]


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with pytest.raises(OptionError, match=r"no\.txt is no readable UTF-8"):
        quantize_checkpoint(TINY, out, calibration=tmp_path / "no.txt")
    with pytest.raises(OptionError, match=r"text\.txt has \d+ tokens; give at least 512"):
        quantize_checkpoint(TINY, out, calibration=text_file(tmp_path, 300))
    monkeypatch.setattr(measure, "ram", lambda: (2_000_000_000, 900_000_000))
    with pytest.raises(QuantizationError, match=r"takes 1\.0 GB; 0\.9 GB are free"):
        quantize_checkpoint(TINY, out, calibration=text_file(tmp_path, 3000))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt"]
