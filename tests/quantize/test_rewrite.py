"""`quantize`, `restore` and the report: in place, all or nothing, shared tables, memory."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from tests.quantize.conftest import Small
from unicorn_backend import quantization_report, quantize, recipes, restore
from unicorn_backend.errors import OptionError, QuantizationError
from unicorn_backend.quantize.modules import QuantEmbedding, QuantLinear

IDS = torch.arange(12).view(2, 6)


def _schemes(model: nn.Module) -> dict[str, str]:
    return {row.name: row.scheme for row in quantization_report(model)}


def test_default_recipe(small: Small) -> None:
    before = small(IDS)
    assert quantize(small) is small
    assert _schemes(small) == {
        "embed_tokens": "w8a",
        **{f"self_attn.{x}_proj": "w8c" for x in "qkvo"},
        **{f"mlp.{x}_proj": "w4g32" for x in ("gate", "up", "down")},
        "lm_head": "w8a",
    }
    after = small(IDS)
    assert after.dtype == before.dtype
    assert float((after - before).detach().norm() / before.detach().norm()) < 0.05
    assert not any(p.requires_grad for p in small.parameters())


def test_tied_table_stays_one(small: Small) -> None:
    quantize(small)
    head, table = small.lm_head, small.embed_tokens
    assert isinstance(head, QuantLinear) and isinstance(table, QuantEmbedding)
    assert all(a is b for a, b in zip(head.packed, table.packed, strict=True))
    rows = {row.name: row for row in quantization_report(small)}
    assert rows["embed_tokens"].bytes_after > 0 and rows["lm_head"].bytes_after == 0
    assert "lm_head.weight_packed" not in small.state_dict()
    for moved in (copy.deepcopy(small), copy.deepcopy(small).to("cpu"), copy.deepcopy(small).to(torch.bfloat16)):
        assert moved.lm_head.packed[0].data_ptr() == moved.embed_tokens.packed[0].data_ptr()


def test_untied_head(untied: Small) -> None:
    quantize(untied)
    assert _schemes(untied)["embed_tokens"] == "w8a" and _schemes(untied)["lm_head"] == "w8c"


@pytest.mark.parametrize("recipe", recipes())
def test_again_is_a_no_op(small: Small, recipe: str) -> None:
    quantize(small, recipe)
    before = {name: tensor.data_ptr() for name, tensor in small.state_dict().items()}
    quantize(small, recipe)
    assert {name: tensor.data_ptr() for name, tensor in small.state_dict().items()} == before


def test_another_recipe_is_refused(small: Small) -> None:
    quantize(small)
    with pytest.raises(OptionError, match=r"already quantized.*'q4'"):
        quantize(small, "q4")
    assert _schemes(small)["self_attn.q_proj"] == "w8c"


def test_unknown_recipe_and_scheme(small: Small) -> None:
    with pytest.raises(OptionError, match="allowed are 'default'"):
        quantize(small, "int3")
    with pytest.raises(OptionError, match="w3"):
        quantize(small, rules={"mlp": "w3"})
    with pytest.raises(OptionError, match="w3"):
        quantize(small, rules=lambda name, module: "w3")
    assert type(small.lm_head) is nn.Linear


def test_rules(small: Small) -> None:
    quantize(small, rules={r"q_proj$": None, r"down_proj$": "w8c"})
    schemes = _schemes(small)
    assert (schemes["self_attn.q_proj"], schemes["mlp.down_proj"], schemes["mlp.up_proj"]) == ("float", "w8c", "w4g32")


def test_rules_as_function(small: Small) -> None:
    quantize(small, rules=lambda name, module: "float" if "attn" in name else None)
    schemes = _schemes(small)
    assert (schemes["self_attn.q_proj"], schemes["mlp.up_proj"]) == ("float", "w4g32")


def test_embedding_decides_for_a_tied_head(small: Small) -> None:
    quantize(small, rules={r"lm_head": "w4g32"})
    assert _schemes(small)["lm_head"] == _schemes(small)["embed_tokens"] == "w8a"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_weights_change_nothing(small: Small, bad: float) -> None:
    with torch.no_grad():
        small.mlp.down_proj.weight[3, 7] = bad
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    with pytest.raises(QuantizationError, match=r"mlp\.down_proj\.weight has 1 NaN or Inf"):
        quantize(small)
    assert type(small.embed_tokens) is nn.Embedding
    assert all(torch.equal(t, before[n]) or n == "mlp.down_proj.weight" for n, t in small.state_dict().items())
    assert small.embed_tokens.weight.requires_grad
    quantize(small, rules={"down_proj": None})


def test_meta_is_refused() -> None:
    with torch.device("meta"):
        model = Small()
    with pytest.raises(QuantizationError, match=r"embed_tokens\.weight is on the meta device"):
        quantize(model)


def test_restore(small: Small) -> None:
    before, keys = small(IDS), list(small.state_dict())
    quantize(small, keep_weights=True)
    report = {row.name: row for row in quantization_report(small)}
    assert report["mlp.up_proj"].sqnr_db == pytest.approx(25.0, abs=1.5)  # uniform weights
    assert restore(small) is small
    assert torch.equal(small(IDS), before) and list(small.state_dict()) == keys
    assert small.lm_head.weight is small.embed_tokens.weight
    quantize(small, "q4")


def test_restore_without_kept_weights(small: Small) -> None:
    with pytest.raises(QuantizationError, match="no quantized modules"):
        restore(small)
    quantize(small)
    with pytest.raises(QuantizationError, match="was not kept"):
        restore(small)
    assert isinstance(small.lm_head, QuantLinear)


def test_float_weights_are_let_go(small: Small) -> None:
    weights = [weakref.ref(p) for p in small.parameters() if p.dim() == 2]
    quantize(small)
    assert not [ref for ref in weights if ref() is not None]


def test_memory_goes_back_to_the_system(native: None) -> None:
    """151 MB of bf16 become 42 MB of INT4, with at most one float tensor (38 MB) beside them."""
    quantize(nn.Linear(64, 64, bias=False), "q4")  # a process's first call loads 37 MB of libraries, which stay
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(4096, 4608, bias=False, dtype=torch.bfloat16) for _ in range(4)))
    for parameter in model.to_empty(device="cpu").parameters():
        nn.init.constant_(parameter, 0.5)
    del parameter
    before = _resident()
    quantize(model, "q4")
    gc.collect()
    assert _resident() - before < -95e6  # -109 MB, or more where the heap had room for the packed ones


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_hooks_and_references_survive(small: Small) -> None:
    held, calls = small.mlp.up_proj, []
    held.register_forward_hook(lambda *_: calls.append(1))
    quantize(small)
    small(IDS)
    assert calls and small.mlp.up_proj is held


def test_bias_stays_float(small: Small) -> None:
    quantize(small)
    assert small.self_attn.q_proj.bias is not None and small.self_attn.q_proj.bias.dtype == torch.float32


def test_pickle_and_deepcopy(small: Small) -> None:
    quantize(small)
    expected = small(IDS)
    assert torch.equal(copy.deepcopy(small)(IDS), expected)
    assert torch.equal(pickle.loads(pickle.dumps(small))(IDS), expected)


def test_state_dict_round_trip(small: Small) -> None:
    quantize(small)
    other = quantize(Small().eval())
    assert not torch.equal(other(IDS), small(IDS))
    other.load_state_dict(small.state_dict())
    assert torch.equal(other(IDS), small(IDS))


class Own(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, self.weight * 2)


class Plain(nn.Linear):
    extra = 3


def test_what_is_left_alone() -> None:
    model = nn.ModuleDict(
        {
            "own": Own(32, 32),
            "plain": Plain(32, 32),
            "normed": parametrizations.weight_norm(nn.Linear(32, 32)),
            "attention": nn.MultiheadAttention(32, 4),
            "renorm": nn.Embedding(10, 32, max_norm=1.0),
            "ints": nn.Linear(32, 32).to(torch.float64),
        }
    )
    quantize(model)
    schemes = _schemes(model)
    assert schemes.pop("plain") == "w8c" and set(schemes.values()) == {"float"}
    assert isinstance(model["plain"], Plain) and model["plain"].extra == 3
    reasons = {row.name: row.reason for row in quantization_report(model)}
    assert "own forward" in reasons["own"] and "max_norm" in reasons["renorm"]
    model["attention"](*[torch.randn(3, 32)] * 3)


def test_part_then_whole(untied: Small) -> None:
    quantize(untied.mlp, rules={"": "w4g32"})
    quantize(untied)
    assert "float" not in _schemes(untied).values()


def test_dtype_change_moves_activations_only(small: Small) -> None:
    quantize(small)
    before = [t.clone() for t in small.embed_tokens.packed]
    small.to(torch.bfloat16)
    assert small(IDS).dtype == torch.bfloat16 and small.embed_tokens.weight.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(before, small.embed_tokens.packed, strict=True))


def test_compiles_without_breaks(small: Small) -> None:
    quantize(small)
    expected = small(IDS)
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    assert torch.equal(compiled(IDS), expected)
