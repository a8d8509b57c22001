"""Scaling columns first: which links are found, that the function stays, and what is left alone."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma4TextConfig, LlamaConfig

from unicorn_backend import quantize
from unicorn_backend.layouts import dequantize
from unicorn_backend.models import SAMPLE_TEXT, load_tokenizer
from unicorn_backend.quantize import prescale
from unicorn_backend.quantize.calibration import importance
from unicorn_backend.quantize.rewrite import restore
from unicorn_backend.quantize.schemes import quantize_weight

pytestmark = pytest.mark.usefixtures("native")
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 128,
}


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    text = SAMPLE_TEXT.read_text(encoding="utf-8")[:2500]
    found: torch.Tensor = load_tokenizer()(text, return_tensors="pt").input_ids[:, :512]
    return found


def random_model(config: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.3, 1.4)
    return model


def scaled(model: Any, scaling: prescale.Scaling) -> Any:
    """A copy of the model with its float weights scaled."""
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if name in scaling.norms:
            module.weight.data = scaling.norms[name]
        elif isinstance(module, torch.nn.Linear):
            module.weight.data = scaling.apply([name], module.weight.data).to(module.weight.dtype)
    return model


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found


@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_the_function_stays(tiny: Any, ids: torch.Tensor, family: str) -> None:
    model = tiny if family == "gemma3" else random_model(LlamaConfig(**SMALL))
    ids = ids % model.config.vocab_size
    model = model.float()
    layers = model.config.num_hidden_layers
    links, refused = prescale.find(model, ids)
    assert Counter(link.kind for link in links) == {
        "between norm and q_proj, k_proj, v_proj": layers,
        "between norm and gate_proj, up_proj": layers,
        "between up_proj and down_proj": layers,
        "between v_proj and o_proj": layers,
    }
    assert refused == []
    found = prescale.scaling(model, ids, importance(model, ids), lambda name: True)
    assert all(factors.std() > 0.01 for part in (found.columns, found.rows) for factors in part.values())
    want, got = logits(model, ids), logits(scaled(model, found), ids)
    assert (got - want).abs().max() < 1e-4 * want.std()
    one = next(iter(found.norms))  # the check above sees a single norm that is not scaled
    broken = prescale.Scaling(found.columns, found.rows, {k: v for k, v in found.norms.items() if k != one})
    assert (logits(scaled(model, broken), ids) - want).abs().max() > 1e-2 * want.std()


def test_norms_round_and_columns_take_the_rest(tiny: Any, ids: torch.Tensor) -> None:
    """In bf16 a norm's weight rounds; norm and columns together still multiply to the old gain."""
    assert tiny.dtype == torch.bfloat16
    found = prescale.scaling(tiny, ids, importance(tiny, ids), lambda name: True)
    name = "model.layers.3.pre_feedforward_layernorm"
    old, new = tiny.get_submodule(name).weight.float(), found.norms[name]
    assert new.dtype == torch.bfloat16
    product = (1 + new.float()) * found.columns["model.layers.3.mlp.gate_proj"]
    torch.testing.assert_close(product, 1 + old, rtol=1e-6, atol=0)


def test_a_norm_of_the_values_is_refused(ids: torch.Tensor) -> None:
    model = random_model(
        Gemma4TextConfig(**SMALL, hidden_size_per_layer_input=0, layer_types=["sliding_attention"] * 2)
    )
    links, refused = prescale.find(model, ids % 128)
    kinds = {link.kind for link in links}
    assert "between v_proj and o_proj" not in kinds and "between up_proj and down_proj" in kinds
    assert [text.split(":")[0] for text in refused] == ["columns are not scaled between v_proj and o_proj"]


def test_weights_on_their_grid_stay(tiny: Any, ids: torch.Tensor) -> None:
    tiny = tiny.float()
    before = {}
    for name in (f"model.layers.1.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")):
        weight = tiny.get_submodule(name).weight
        before[name] = weight.data = dequantize(quantize_weight(weight.data, "w4g32"), *weight.shape)
    norm = tiny.get_submodule("model.layers.1.pre_feedforward_layernorm").weight.detach().clone()
    quantize(tiny, calibration=ids)
    for name, weight in before.items():
        assert torch.equal(dequantize(tiny.get_submodule(name).packed, *weight.shape), weight)
    assert torch.equal(tiny.get_submodule("model.layers.1.pre_feedforward_layernorm").weight, norm)


def test_restore_brings_the_norms_back(tiny: Any, ids: torch.Tensor) -> None:
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    quantize(tiny, calibration=ids, keep_weights=True)
    name = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(tiny.state_dict()[name], before[name])
    restore(tiny)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.state_dict().items())


def test_less_divergence_on_another_text(tiny: Any, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    known, other = ids[:, :256], ids[:, 256:]
    want = logits(tiny, other)[0].double().log_softmax(-1)

    def divergence(model: Any) -> float:
        got = logits(quantize(model, "q4", calibration=known), other)[0].double().log_softmax(-1)
        return float((want.exp() * (want - got)).sum(-1).mean())

    with_scales = divergence(copy.deepcopy(tiny))
    monkeypatch.setattr(prescale, "find", lambda model, ids: ([], []))
    assert with_scales < 0.95 * divergence(tiny)
