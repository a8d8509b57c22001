"""Save, load and quantize while loading, through transformers' own calls; and what damaged files say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from unicorn_backend import quantization_report, quantize, recipes, restore
from unicorn_backend.errors import CheckpointError, OptionError, QuantizationError
from unicorn_backend.integration.hf_quantizer import UnicornConfig
from unicorn_backend.models import TINY
from unicorn_backend.quantize.modules import QuantEmbedding, QuantLinear

IDS = torch.tensor([[2, 17, 900, 41, 5]])
GREEDY = {"max_new_tokens": 3, "do_sample": False}
PACKED = [name for name in recipes() if name != "none"]


def state(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def assert_same_state(a: Any, b: Any) -> None:
    first, second = state(a), state(b)
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


def load(folder: Path | str, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **settings).eval()


@pytest.fixture(scope="module")
def packed_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, quantized with the default recipe and saved. Copy it to change it."""
    folder = tmp_path_factory.mktemp("packed")
    quantize(load(TINY, dtype="auto")).save_pretrained(folder)
    return folder


@pytest.fixture
def broken(packed_dir: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(packed_dir, tmp_path / "broken"))


@pytest.mark.parametrize("recipe", PACKED)
def test_round_trip_is_exact(tiny: Any, tmp_path: Path, recipe: str) -> None:
    quantize(tiny, recipe).save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert_same_state(tiny, loaded)
    assert quantization_report(loaded) == quantization_report(tiny)
    assert loaded.dtype == torch.bfloat16 and loaded.hf_quantizer.is_compileable


@pytest.mark.parametrize("recipe", PACKED)
def test_quantizing_while_loading_gives_the_same_bits(recipe: str, tmp_path: Path) -> None:
    streamed = load(TINY, dtype="auto", quantization_config=UnicornConfig(recipe))
    assert_same_state(streamed, quantize(load(TINY, dtype="auto"), recipe))
    streamed.save_pretrained(tmp_path)
    assert_same_state(streamed, load(tmp_path))


def test_loaded_model_generates(packed_dir: Path, tiny: Any) -> None:
    expected = quantize(tiny).generate(IDS, **GREEDY)
    loaded = load(packed_dir)
    assert torch.equal(loaded.generate(IDS, **GREEDY), expected)
    compiled = torch.compile(loaded.forward, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS).logits, loaded(IDS).logits)


def test_tied_table_is_stored_and_loaded_once(packed_dir: Path) -> None:
    names = list(load_file(packed_dir / "model.safetensors"))
    assert not [name for name in names if name.startswith("lm_head")]
    loaded = load(packed_dir)
    head, table = loaded.lm_head, loaded.model.embed_tokens
    assert isinstance(head, QuantLinear) and isinstance(table, QuantEmbedding)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(head.packed, table.packed, strict=True))
    loaded.tie_weights()
    assert isinstance(loaded.lm_head, QuantLinear)


def test_embedding_subclass_keeps_its_scale(packed_dir: Path, tiny: Any) -> None:
    loaded = load(packed_dir)
    rows = loaded.model.embed_tokens(IDS)
    exact = tiny.model.embed_tokens(IDS)
    assert rows.dtype == exact.dtype
    assert float((rows.float() - exact.float()).detach().norm() / exact.float().detach().norm()) < 0.01


def test_file_is_smaller_and_says_what_it_is(packed_dir: Path) -> None:
    assert (packed_dir / "model.safetensors").stat().st_size < 0.5 * (TINY / "model.safetensors").stat().st_size
    config = json.loads((packed_dir / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "unicorn"
    assert config["recipe"]["name"] == "default" and config["recipe"]["version"] == 1


def test_shards(tiny: Any, tmp_path: Path) -> None:
    quantize(tiny).save_pretrained(tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_state(tiny, load(tmp_path))


def test_rules_travel_with_the_checkpoint(tiny: Any, tmp_path: Path) -> None:
    quantize(tiny, rules={r"layers\.0\.": None, r"down_proj": "w8c"}).save_pretrained(tmp_path)
    loaded = load(tmp_path)
    schemes = {row.name: row.scheme for row in quantization_report(loaded)}
    assert schemes["model.layers.0.mlp.up_proj"] == "float" and schemes["model.layers.1.mlp.down_proj"] == "w8c"
    assert_same_state(tiny, loaded)


def test_restored_model_saves_as_float(make_tiny: Callable[[], Any], tmp_path: Path) -> None:
    model = restore(quantize(make_tiny(), keep_weights=True))
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert_same_state(make_tiny(), load(tmp_path, dtype="auto"))


def test_a_loaded_model_keeps_its_recipe(packed_dir: Path) -> None:
    loaded = load(packed_dir)
    quantize(loaded)
    with pytest.raises(OptionError, match="already quantized"):
        quantize(loaded, "q4")


def vision_model() -> Any:
    text = dict(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    vision = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=299)
    return Gemma3ForConditionalGeneration(config).to(torch.bfloat16).eval()


def test_vision_language_model(tmp_path: Path) -> None:
    model = vision_model()
    model.save_pretrained(tmp_path / "float")
    quantize(model).save_pretrained(tmp_path / "packed")
    loaded = Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "packed").eval()
    assert_same_state(model, loaded)
    rows = quantization_report(loaded)
    assert {row.scheme for row in rows if "vision" in row.name or "projector" in row.name} == {"float"}
    assert {row.scheme for row in rows if "language_model" in row.name} == {"w8a", "w8c", "w4g32"}
    config = UnicornConfig()
    streamed = Gemma3ForConditionalGeneration.from_pretrained(
        tmp_path / "float", dtype="auto", quantization_config=config
    )
    assert_same_state(model, streamed)
    with torch.no_grad():
        assert torch.isfinite(loaded(IDS.clamp_max(290)).logits).all()


def test_ultra_packs_the_vision_tower() -> None:
    """In INT8, with features that stay; the position table and the projector's own matrix do not."""
    model = vision_model()
    model.model.multi_modal_projector.mm_input_projection_weight.data.normal_()
    pixels = torch.randn(1, 3, 28, 28, dtype=torch.bfloat16)
    with torch.no_grad():
        before = model.get_image_features(pixels).pooler_output.float()
        quantize(model, "ultra")
        after = model.get_image_features(pixels).pooler_output.float()
    vision = [row for row in quantization_report(model) if "vision" in row.name or "projector" in row.name]
    assert {row.scheme for row in vision if ".layers." in row.name} == {"w8g32"}
    assert {row.scheme for row in vision if "position" in row.name} == {"float"}
    assert float((after - before).norm() / before.norm()) < 0.03


@pytest.mark.parametrize("cut", [0, 4, 100, 5000, -1])
def test_truncated_file(broken: Path, cut: int) -> None:
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*copy or download it again"):
        load(broken)


def test_damaged_header(broken: Path) -> None:
    path = broken / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:40] = b"\xff" * 32
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(broken)


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


NAME = "model.layers.0.mlp.up_proj.weight_packed"


def test_missing_tensor(broken: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[NAME]

    change_tensors(broken, drop)
    with pytest.raises(CheckpointError, match=NAME.replace(".", r"\.")):
        load(broken)


def test_wrong_shape(broken: Path) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NAME] = tensors[NAME][:-1].contiguous()

    change_tensors(broken, cut)
    with pytest.raises(CheckpointError, match=NAME.replace(".", r"\.") + r": the file has U8 \[63, 8, 4, 16, 4\]"):
        load(broken)


def test_wrong_dtype(broken: Path) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NAME] = tensors[NAME].to(torch.int32)

    change_tensors(broken, widen)
    with pytest.raises(CheckpointError, match=NAME.replace(".", r"\.")):
        load(broken)


def change_config(folder: Path, **recipe: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["recipe"].update(recipe)
    path.write_text(json.dumps(config))


def test_newer_version(broken: Path) -> None:
    change_config(broken, version=2)
    with pytest.raises(CheckpointError, match=r"version 2.*upgrade"):
        load(broken)


def test_damaged_recipe(broken: Path) -> None:
    change_config(broken, rules=[{"kind": "any"}])
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(broken)


def test_recipe_of_another_model(broken: Path) -> None:
    change_config(broken, rules=[{"kind": "linear", "pattern": "", "scheme": "w8c"}])
    with pytest.raises(CheckpointError, match=r"weight_packed: the file has .*config\.json does not belong"):
        load(broken)


def test_nan_while_loading(tmp_path: Path, make_tiny: Callable[[], Any]) -> None:
    model = make_tiny()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(QuantizationError, match=r"layers\.1\.mlp\.up_proj\.weight has 1 NaN or Inf"):
        load(tmp_path, dtype="auto", quantization_config=UnicornConfig())


def test_bad_configs(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="int3"):
        UnicornConfig("int3")
    with pytest.raises(OptionError, match="unknown option 'bits'"):
        UnicornConfig(bits=4)
    with pytest.raises(OptionError, match="device_map"):
        load(TINY, quantization_config=UnicornConfig(), device_map="cuda")


def test_a_recipe_that_depends_on_the_model(tiny: Any, tmp_path: Path) -> None:
    """q4_k_m asks for the number of layers and the tied head: while loading, in place, again, and after saving."""
    loaded = AutoModelForCausalLM.from_pretrained(TINY, quantization_config=UnicornConfig("q4_k_m"))
    assert_same_state(loaded, quantize(tiny, "q4_k_m"))
    assert [layer.mlp.down_proj.scheme for layer in tiny.model.layers] == ["q4k", "q4k", "q6k", "q4k", "q4k", "q6k"]
    assert quantize(tiny, "q4_k_m") is tiny
    loaded.save_pretrained(tmp_path)
    assert_same_state(quantize(AutoModelForCausalLM.from_pretrained(tmp_path), "q4_k_m"), tiny)
