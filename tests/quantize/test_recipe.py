"""Recipes: which weight gets which scheme, and that they survive JSON."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from torch import nn

from tests.scripts import ROOT, load
from unicorn_backend.errors import CheckpointError, OptionError
from unicorn_backend.quantize.recipe import Recipe, Rule, recipes

WIDE, NARROW, SQUARE = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8)
TABLE = nn.Embedding(8, 8)
KINDS = (nn.Linear, nn.Embedding)

CASES: tuple[tuple[str, nn.Module, str | None], ...] = (
    ("model.embed_tokens", TABLE, "w8a"),
    ("model.language_model.embed_tokens", TABLE, "w8a"),
    ("transformer.wte", TABLE, "w8a"),
    ("transformer.wpe", TABLE, None),
    ("lm_head", WIDE, "w8c"),
    ("model.layers.0.self_attn.q_proj", SQUARE, "w8c"),
    ("model.layers.0.self_attn.o_proj", SQUARE, "w8c"),
    ("model.layers.0.self_attn.qkv_proj", WIDE, "w8c"),
    ("transformer.h.0.attn.c_proj", SQUARE, "w8c"),
    ("gpt_neox.layers.0.attention.query_key_value", WIDE, "w8c"),
    ("model.layers.0.mlp.gate_proj", WIDE, "w4g32"),
    ("model.layers.0.mlp.gate_up_proj", WIDE, "w4g32"),
    ("model.layers.0.mlp.down_proj", NARROW, "w4g32"),
    ("gpt_neox.layers.0.mlp.dense_h_to_4h", WIDE, "w4g32"),
    ("model.decoder.layers.0.fc1", WIDE, "w4g32"),
    ("layers.0.feed_forward.w2", NARROW, "w4g32"),
    ("model.layers.0.mlp.experts.3.w1", WIDE, "w4g32"),
    ("model.layers.0.block_sparse_moe.gate", NARROW, None),
    ("model.layers.0.mlp.gate", NARROW, None),
    ("model.layers.0.mlp.router", NARROW, None),
    ("model.layers.0.something_else", WIDE, "w8c"),
    ("model.vision_tower.encoder.layers.0.mlp.fc1", WIDE, None),
    ("model.vision_tower.encoder.layers.0.self_attn.q_proj", SQUARE, None),
    ("vision_tower.embeddings.position_embedding", TABLE, None),
    ("visual.blocks.0.attn.qkv", WIDE, None),
    ("model.multi_modal_projector.linear", WIDE, None),
    ("audio_tower.layers.0.fc1", WIDE, None),
    ("mm_projector.0", WIDE, None),
)


@pytest.mark.parametrize(("name", "module", "scheme"), CASES, ids=[case[0] for case in CASES])
def test_default(name: str, module: nn.Module, scheme: str | None) -> None:
    assert Recipe.named("default").scheme_for(name, module) == scheme


@pytest.mark.parametrize(
    ("recipe", "attention", "ffn"), [("q4", "w4g32", "w4g32"), ("int8", "w8c", "w8c"), ("none", None, None)]
)
def test_other_recipes(recipe: str, attention: str | None, ffn: str | None) -> None:
    chosen = Recipe.named(recipe)
    assert chosen.scheme_for("model.layers.0.self_attn.q_proj", SQUARE) == attention
    assert chosen.scheme_for("model.layers.0.mlp.up_proj", WIDE) == ffn
    assert chosen.scheme_for("model.vision_tower.fc1", WIDE) is None
    assert chosen.scheme_for("model.embed_tokens", TABLE) == (None if recipe == "none" else "w8a")


def test_names() -> None:
    assert recipes() == ("default", "q4", "ultra", "hybrid", "q4_k_m", "int8", "none")
    with pytest.raises(OptionError, match=r"'int3'.*'default', 'q4', 'ultra', 'hybrid', 'q4_k_m', 'int8', 'none'"):
        Recipe.named("int3")


@pytest.mark.parametrize("name", recipes())
def test_json_round_trip(name: str) -> None:
    recipe = Recipe.named(name).with_overrides({"layers\\.0\\.": None, "head$": "w8c"})
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def llama(layers: int, tied: bool) -> nn.Module:
    """Modules under the names of a Llama, with a vision tower that has more layers."""
    layer = {"self_attn.q_proj": SQUARE, "self_attn.v_proj": SQUARE, "mlp.up_proj": WIDE, "mlp.down_proj": NARROW}
    model = nn.Module()
    model.layers = nn.ModuleList([_nested(layer) for _ in range(layers)])
    model.vision_tower = nn.Module()
    model.vision_tower.layers = nn.ModuleList([_nested(layer) for _ in range(2 * layers)])
    model.embed_tokens, model.lm_head = nn.Embedding(8, 8), nn.Linear(8, 8)
    if tied:
        model.lm_head.weight = model.embed_tokens.weight
    return model


def _nested(modules: dict[str, nn.Module]) -> nn.Module:
    root = nn.Module()
    for name, module in modules.items():
        outer, inner = name.split(".")
        if not hasattr(root, outer):
            root.add_module(outer, nn.Module())
        root.get_submodule(outer).add_module(inner, copy.deepcopy(module))
    return root


@pytest.mark.parametrize(
    ("layers", "more"),
    [(1, [0]), (6, [2, 5]), (26, [0, 1, 2, 5, 8, 11, 14, 17, 20, 22, 23, 24, 25])],
)
@pytest.mark.parametrize("tied", [True, False])
def test_q4_k_m(layers: int, more: list[int], tied: bool) -> None:
    """llama.cpp's use_more_bits; a table of its own stays q4k."""
    model = llama(layers, tied)
    recipe = Recipe.named("q4_k_m").fitted(model)
    schemes = {name: recipe.scheme_for(name, m) for name, m in model.named_modules() if isinstance(m, KINDS)}
    for kind in ("self_attn.v_proj", "mlp.down_proj"):
        assert [i for i in range(layers) if schemes[f"layers.{i}.{kind}"] == "q6k"] == more
    others = {schemes[f"layers.{i}.{kind}"] for i in range(layers) for kind in ("self_attn.q_proj", "mlp.up_proj")}
    assert others == {"q4k"} and schemes["lm_head"] == "q6k" and schemes["embed_tokens"] == ("q6k" if tied else "q4k")
    assert not any(scheme for name, scheme in schemes.items() if "vision" in name)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))).fitted(model) == recipe


def test_overrides_come_first() -> None:
    recipe = Recipe.named("default").with_overrides({r"layers\.0\.": None, r"up_proj$": "w8c"})
    assert recipe.scheme_for("model.layers.0.mlp.up_proj", WIDE) is None
    assert recipe.scheme_for("model.layers.1.mlp.up_proj", WIDE) == "w8c"
    assert recipe.scheme_for("model.layers.1.mlp.gate_proj", WIDE) == "w4g32"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "version 99.*upgrade"),
        ({"version": None}, "version None"),
        ({"rules": [{"kind": "any"}]}, "damaged"),
        ({"rules": [{"kind": "any", "pattern": "", "scheme": "w2"}]}, "w2"),
        ({"rules": 3}, "damaged"),
    ],
)
def test_damaged_json(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Recipe.from_dict({**Recipe.named("default").to_dict(), **change})


@pytest.mark.parametrize(
    ("rule", "message"),
    [(("any", "(", "w8c"), "regular expression"), (("any", "", "w9"), "w9"), (("x", "", "w8c"), "kind")],
)
def test_bad_rules(rule: tuple[str, str, str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Rule(*rule)


def test_ultra_brings_27_billion_weights_under_16_gb() -> None:
    """Of the true shapes, with the vision tower; and the table in the docs is of this code."""
    sizes = load(ROOT / "benchmarks" / "sizes.py")
    whole = sizes.model("gemma3-27b")
    assert sizes.total_bytes(whole, {}) == 54_864_813_280  # as published
    total = sizes.total_bytes(whole, sizes.schemes(whole, "ultra"))
    written = json.loads(sizes.RESULT.read_text(encoding="utf-8"))["rows"]
    assert total == next(row for row in written if row["model"] == "gemma3-27b")["recipes"]["ultra"]["bytes"] < 16e9
