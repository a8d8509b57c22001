"""Weights that get more bits: the estimate against divergences that are measured, the budget, and both ways to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from unicorn_backend import models, quantize, quantize_checkpoint
from unicorn_backend.errors import OptionError
from unicorn_backend.layouts import dequantize
from unicorn_backend.quantize import outliers
from unicorn_backend.quantize.modules import QuantLinear
from unicorn_backend.quantize.quality import compare
from unicorn_backend.quantize.schemes import quantize_weight

LAYER = "model.layers.{}.{}"
NAMES = [LAYER.format(i, name) for i, name in ((0, "self_attn.v_proj"), (0, "self_attn.o_proj"), (1, "mlp.down_proj"))]
QUIET = LAYER.format(2, "self_attn.v_proj")


@pytest.fixture(scope="module")
def ids() -> Any:
    return models.sample_ids(1024).view(1, -1)


@torch.no_grad()
def measured(model: Any, ids: torch.Tensor, name: str, plain: torch.Tensor) -> float:
    """KL divergence that one weight in w4n32 makes, nats per token."""
    weight = model.get_submodule(name).weight
    kept = weight.clone()
    weight.copy_(dequantize(quantize_weight(kept, "w4n32"), *kept.shape))
    other = model(ids).logits[0].log_softmax(-1)
    weight.copy_(kept)
    return float((plain.exp() * (plain - other)).sum(-1).mean())


def test_the_estimate(ids: torch.Tensor) -> None:
    """Within a factor of two of what is measured, where more than a hundred lie between the weights of two layers."""
    model = models.load().float().eval()
    found = outliers.sensitivity(model, ids, dict.fromkeys([*NAMES, QUIET], "w4n32"))
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        plain = model(ids).logits[0].log_softmax(-1)
    for name in NAMES:
        assert 0.5 < found[name] / measured(model, ids, name, plain) < 2, name
    assert found[QUIET] < found[NAMES[0]] / 100


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best per bit first, steps of several sizes, and never more than the budget."""
    model = nn.ModuleDict({name: nn.Linear(256, 256, bias=False) for name in "abc"})
    scores = {"a": 1.0, "b": 0.1, "c": 0.0}
    monkeypatch.setattr(outliers, "sensitivity", lambda model, ids, schemes: {name: scores[name] for name in schemes})
    ids, four = torch.zeros(1, 1), dict.fromkeys("abc", "w4n32")
    assert outliers.choose(model, ids, four, 0.3) == {}
    assert outliers.choose(model, ids, four, 0.4) == {"a": "q5k"}
    assert outliers.choose(model, ids, four, 0.8) == {"a": "q6k"}
    assert outliers.choose(model, ids, four, 3.0) == {"a": "w8c", "b": "w8c"}
    assert outliers.choose(model, ids, dict.fromkeys("abc", "w4g32"), 1.25) == {"a": "w8c"}
    assert outliers.choose(model, ids, {"a": "w8c", "b": "w4g32", "c": "w8c"}, 1.25) == {"b": "w8c"}


def test_disk_and_memory_choose_the_same(tmp_path: Path, ids: torch.Tensor) -> None:
    """And it helps on other tokens. The weight that suffers most is left by the caller's rule."""
    text = models.load_tokenizer().decode(ids[0], skip_special_tokens=True)
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    ids = models.load_tokenizer()(text, return_tensors="pt").input_ids
    plain = quantize(models.load(), "q4", calibration=ids)
    model = quantize(models.load(), "q4", calibration=ids, outlier_bits=0.1, rules={"layers.0.self_attn.v": "w4g32"})
    model.save_pretrained(tmp_path / "memory")
    result = quantize_checkpoint(
        "tiny", tmp_path / "disk", "q4", calibration=tmp_path / "text.txt", outlier_bits=0.1,
        rules={"layers.0.self_attn.v": "w4g32"},
    )  # fmt: skip
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("memory", "disk"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    rows = [row for row in result["weights"] if row["name"].endswith("_proj.weight")]
    kept = {row["name"].removesuffix(".weight") for row in rows if row["scheme"] == "w8c"}
    assert NAMES[1] in kept and NAMES[0] not in kept, "the caller's rules come first"
    weights = sum(row["shape"][0] * row["shape"][1] for row in rows)
    assert 4.5 < sum(row["bytes_after"] for row in rows) * 8 / weights <= 4.6
    assert f"{len(kept)} weights have more bits" in result["notes"][0]
    held, reference = models.sample_ids(3072)[..., 2048:], models.load()
    assert compare(model, reference, held).kl_mean < 0.9 * compare(plain, reference, held).kl_mean


def test_mixtures_of_experts() -> None:
    """Linears are chosen among, experts are not linears."""
    from tests.quantize.test_experts import experts_of, make

    model = make("qwen3_moe")
    quantize(model, "q4", calibration=torch.randint(3, 120, (1, 64)), outlier_bits=1.0)
    schemes = {name: module.scheme for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert {scheme for name, scheme in schemes.items() if "experts" in name} == {"w4g32"}
    assert "w8c" in {scheme for name, scheme in schemes.items() if "self_attn" in name}
    assert experts_of(model).gate_up.scheme == "w4g32"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"outlier_bits": 0.1}, "give a calibration text"),
        ({"outlier_bits": -1.0, "calibration": torch.zeros(1, 600, dtype=torch.int64)}, "more than 0 and less than 8"),
        ({"outlier_bits": 9.0, "calibration": torch.zeros(1, 600, dtype=torch.int64)}, "more than 0 and less than 8"),
    ],
)
def test_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        quantize(models.load(), "q4", **arguments)


def test_rules_of_a_function() -> None:
    rules: Any = outliers.after(lambda name, module: "q6k" if name == "a" else None, {"^a$": "w8c", "^b$": "w8c"})
    assert [rules(name, nn.Linear(1, 1)) for name in "abc"] == ["q6k", "w8c", None]
