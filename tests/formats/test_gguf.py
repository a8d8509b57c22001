"""GGUF in and out: the types with a packed form keep their values, others are requantized, hostile files refused."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from unicorn_backend import models, quantize, quantize_checkpoint, verify
from unicorn_backend.errors import CheckpointError, QuantizationError
from unicorn_backend.formats.gguf import (
    read_header,
    repack_iq4_nl,
    repack_q4_0,
    repack_q4_1,
    repack_q4_k,
    repack_q5_k,
    repack_q6_k,
    repack_q8_0,
)
from unicorn_backend.formats.gguf_out import _q8_0, to_q4_0, to_q4_1, to_q4_k, to_q5_k, to_q6_k, to_q8_0
from unicorn_backend.layouts import dequantize
from unicorn_backend.models import SAMPLE_TEXT, TINY
from unicorn_backend.quantize.schemes import quantize_weight


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model as GGUF: `q4/model.gguf` (Q4_0, table Q8_0) and `bf16/model.gguf`."""
    folder = tmp_path_factory.mktemp("gguf")
    quantize_checkpoint(TINY, folder / "q4", "q4", format="gguf")
    quantize_checkpoint(TINY, folder / "bf16", "none", format="gguf")
    return folder


def random_blocks(kind: Type, rows: int, k: int) -> np.ndarray:
    """Valid blocks of any type: random bytes with a sane fp16 where the scales are."""
    values = np.random.default_rng(0).standard_normal((rows, k), dtype=np.float32)
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = np.random.default_rng(0).integers(0, 255, (rows, k // elements, size), dtype=np.uint8)
        half = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
        places = {Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,), Type.Q3_K: (108,), Type.IQ4_NL: (0,)}[kind]
        for place in places:
            blocks[:, :, place : place + 2] = half
        return blocks.reshape(rows, -1)


@pytest.mark.parametrize(
    ("kind", "repack", "back"),
    [
        (Type.Q4_0, repack_q4_0, to_q4_0),
        (Type.IQ4_NL, repack_iq4_nl, to_q4_0),
        (Type.Q8_0, repack_q8_0, to_q8_0),
        (Type.Q4_1, repack_q4_1, to_q4_1),
        (Type.Q4_K, repack_q4_k, to_q4_k),
        (Type.Q5_K, repack_q5_k, to_q5_k),
        (Type.Q6_K, repack_q6_k, to_q6_k),
    ],
)
def test_repacks_exactly(kind: Type, repack: Any, back: Any) -> None:
    wide = 8 if kind.name.endswith("_K") else 1
    for rows, k in ((1, 32), (40, 32), (16, 64), (37, 96)):
        k *= wide
        blocks = random_blocks(kind, rows, k)
        packed = repack(torch.from_numpy(blocks))
        assert np.array_equal(dequantize(packed, rows, k).numpy(), gguf.quants.dequantize(blocks, kind))
        assert np.array_equal(back(packed)[:rows].numpy(), blocks)


def with_random_gate(folder: Path, tmp_path: Path, kind: Type) -> np.ndarray:
    """Write tmp_path/model.gguf, the bf16 file with other blocks in gate_proj of layer 1; returns the blocks."""
    blocks = random_blocks(kind, 1024, 256)
    rewrite(
        folder / "bf16/model.gguf",
        tmp_path / "model.gguf",
        lambda n, t: (blocks, kind) if n == "blk.1.ffn_gate.weight" else (t.data, t.tensor_type),
    )
    return blocks


@pytest.mark.parametrize(
    ("kind", "scheme"), [(Type.Q4_1, "w4m32"), (Type.Q4_K, "q4k"), (Type.Q5_K, "q5k"), (Type.Q6_K, "q6k")]
)
def test_stays_packed_in_a_model(folder: Path, tmp_path: Path, kind: Type, scheme: str) -> None:
    """Through the file, the checkpoint, `from_pretrained` and a file again: the values of the blocks, with no note."""
    blocks = with_random_gate(folder, tmp_path, kind)
    result = quantize_checkpoint(tmp_path / "model.gguf", tmp_path / "out")
    assert result["notes"] == [] and verify(tmp_path / "out") == []
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers[1].mlp.gate_proj
    assert module.scheme == scheme
    values = dequantize(module.packed, 1024, 256).numpy()
    assert np.array_equal(values, gguf.quants.dequantize(blocks, kind))
    quantize_checkpoint(tmp_path / "model.gguf", tmp_path / "again", format="gguf")
    readers = [gguf.GGUFReader(tmp_path / name) for name in ("model.gguf", "again/model.gguf")]
    again = {t.name: t for t in readers[1].tensors}["blk.1.ffn_gate.weight"]
    assert again.tensor_type == kind and np.array_equal(again.data, blocks)
    tokens = [reader.fields["tokenizer.ggml.tokens"].contents() for reader in readers]
    assert tokens[0] == tokens[1] and len(tokens[0]) > 1000


def test_q4_k_m_out_and_in_again(tmp_path: Path, tiny: Any) -> None:
    """llama-quantize's choice of types; the same model as quantize() makes, to the bit, in config and logits too."""
    quantize_checkpoint(TINY, tmp_path / "out", "q4_k_m", format="gguf")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out/model.gguf").tensors}
    six = {name for name, kind in kinds.items() if kind == "Q6_K"}
    # what llama-quantize makes of the bf16 file, of 6 layers
    assert six == {"token_embd.weight"} | {f"blk.{i}.{name}.weight" for i in (2, 5) for name in ("attn_v", "ffn_down")}
    assert {kind for name, kind in kinds.items() if "norm" not in name} == {"Q4_K", "Q6_K"}
    result = quantize_checkpoint(tmp_path / "out/model.gguf", tmp_path / "back", "q4_k_m")
    assert sum(row["exact"] for row in result["weights"]) == 43 and result["notes"] == []
    model, expected = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval(), quantize(tiny, "q4_k_m")
    packed = expected.state_dict()
    back = model.state_dict()
    assert all(torch.equal(back[name], packed[name]) for name in packed if "weight_" in name)
    with torch.no_grad():
        ids = torch.tensor([[2, 17, 900, 44]])
        assert torch.equal(model(ids).logits, expected(ids).logits)


def test_rows_that_are_no_super_blocks(tmp_path: Path) -> None:
    """llama.cpp's substitutes: Q5_0 for Q4_K, Q8_0 for Q6_K; to the bit those of the gguf package."""
    config = AutoConfig.from_pretrained(TINY)
    config.update({"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "layer_types": None})
    model = AutoModelForCausalLM.from_config(type(config)(**config.to_dict())).bfloat16()
    model.save_pretrained(tmp_path / "float")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path / "float")
    result = quantize_checkpoint(tmp_path / "float", tmp_path / "out", "q4_k_m", format="gguf")
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "out/model.gguf").tensors}
    kinds = {
        "token_embd": Type.Q8_0,
        "blk.0.ffn_up": Type.Q5_0,
        "blk.1.ffn_down": Type.Q8_0,
        "blk.0.attn_output": Type.Q4_K,
    }
    weights = {"blk.0.ffn_up": model.model.layers[0].mlp.up_proj, "blk.1.ffn_down": model.model.layers[1].mlp.down_proj}
    assert {name: tensors[f"{name}.weight"].tensor_type for name in kinds} == kinds
    for name, module in weights.items():
        values = module.weight.detach().float().numpy()
        assert np.array_equal(tensors[f"{name}.weight"].data, gguf.quants.quantize(values, kinds[name])), name
    assert {row["scheme"] for row in result["weights"]} == {"Q5_0", "Q8_0", "Q4_K", "float"}
    assert verify(tmp_path / "out") == []


def test_hybrid_out_and_in_again(tmp_path: Path, tiny: Any) -> None:
    """What `hybrid` packs in 4 and 5 bits is IQ4_NL and Q5_K to the bit; its table's INT8 has another scale there."""
    quantize_checkpoint(TINY, tmp_path / "out", "hybrid", format="gguf")
    result = quantize_checkpoint(tmp_path / "out/model.gguf", tmp_path / "back")
    floats = {TABLE: tiny.get_submodule(TABLE).weight.detach().clone()}
    rules = {TABLE: "w8g32"}
    back, expected = load_file(tmp_path / "back/model.safetensors"), quantize(tiny, "hybrid", rules=rules).state_dict()
    kinds = [row["scheme"] for row in result["weights"] if row["exact"]]
    assert [kinds.count(scheme) for scheme in ("w4n32", "q5k", "w8g32")] == [30, 12, 1]
    assert all(torch.equal(back[name], expected[name]) for name in back if "proj" in name)
    is_ggmls_q8_0(back, floats)
    computes_the_same(tmp_path / "back", tiny)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values_on_the_grid_of_q4_0_stay(dtype: torch.dtype) -> None:
    """A checkpoint trained for Q4_0 and stored as floats: quantizing it changes no value."""
    blocks = random_blocks(Type.Q4_0, 512, 256)
    values = torch.from_numpy(gguf.quants.dequantize(blocks, Type.Q4_0)).to(dtype)
    ours = dequantize(quantize_weight(values, "w4g32"), 512, 256)
    wrong = ours.to(dtype) != values
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} values, by {(ours - values)[wrong].abs().max()}"


def test_values_on_the_grid_of_q4_0_in_bf16() -> None:
    """bf16 rounds the grid itself: every weight gets its level, and a scale whose grid rounds to the same values.

    Several do, so a scale may be a neighbour of the one that the weights were made with.
    """
    blocks = random_blocks(Type.Q4_0, 512, 256)
    exact = torch.from_numpy(gguf.quants.dequantize(blocks, Type.Q4_0))
    ours = dequantize(quantize_weight(exact.bfloat16(), "w4g32"), 512, 256)
    assert torch.equal(ours.bfloat16(), exact.bfloat16())
    assert float(((ours - exact).abs() / exact.abs().clamp_min(1e-30)).max()) < 2**-8


def test_a_checkpoint_trained_for_q4_0(tmp_path: Path) -> None:
    """`-qat-q4_0-unquantized`: bf16 safetensors with every linear on the grid keep every value, through the disk."""
    model = AutoModelForCausalLM.from_pretrained(TINY)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not model.lm_head:
            blocks = gguf.quants.quantize(module.weight.detach().float().numpy(), Type.Q4_0)
            module.weight.data = torch.from_numpy(gguf.quants.dequantize(blocks, Type.Q4_0)).bfloat16()
    model.save_pretrained(tmp_path / "qat")
    quantize_checkpoint(tmp_path / "qat", tmp_path / "out", "q4")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not model.lm_head:
            values = dequantize(packed.get_submodule(name).packed, *module.weight.shape).bfloat16()
            assert torch.equal(values, module.weight.detach()), name


def test_q8_0_is_that_of_ggml() -> None:
    assert np.array_equal(
        _q8_0(torch.eye(32))[0].numpy(), gguf.quants.quantize(np.eye(32, dtype=np.float32), Type.Q8_0)
    )
    x = torch.randn(7, 96)
    x[2, :32] = 0
    x[3, :32] = torch.arange(32) - 15.5  # ties
    data, (signal, noise) = _q8_0(x)
    expected = gguf.quants.quantize(x.numpy(), Type.Q8_0)
    assert np.array_equal(data.numpy(), expected)
    error = x.numpy() - gguf.quants.dequantize(expected, Type.Q8_0)
    assert noise == pytest.approx(float((error.astype(np.float64) ** 2).sum()), rel=1e-5)
    assert signal == pytest.approx(float(x.double().square().sum()), rel=1e-6)


def test_out_and_in_again(folder: Path, tmp_path: Path, tiny: Any) -> None:
    """What Q4_0 holds comes back to the bit, with config, tokenizer and a report that says so."""
    assert verify(folder / "q4") == []
    result = quantize_checkpoint(folder / "q4", tmp_path / "back", "q4")
    assert result["notes"] == []
    floats = {TABLE: tiny.get_submodule(TABLE).weight.detach().clone()}
    rules = {TABLE: "w8g32"}
    back, expected = load_file(tmp_path / "back/model.safetensors"), quantize(tiny, "q4", rules=rules).state_dict()
    for row in result["weights"]:
        if row["exact"] and row["scheme"] == "w4g32":
            assert row["sqnr_db"] is None
            assert all(torch.equal(back[name], expected[name]) for name in row["tensors"])
    assert sum(row["exact"] for row in result["weights"]) == 43
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    reference = AutoModelForCausalLM.from_pretrained(TINY)
    for key in ("layer_types", "rope_parameters", "query_pre_attn_scalar", "sliding_window", "vocab_size"):
        assert getattr(model.config, key) == getattr(reference.config, key)
    text = SAMPLE_TEXT.read_text(encoding="utf-8")[:2000]
    ids = [AutoTokenizer.from_pretrained(path)(text).input_ids for path in (tmp_path / "back", TINY)]
    assert ids[0] == ids[1]
    is_ggmls_q8_0(back, floats)
    computes_the_same(tmp_path / "back", tiny)


TABLE = "model.embed_tokens"


def is_ggmls_q8_0(back: dict[str, torch.Tensor], floats: dict[str, torch.Tensor]) -> None:
    """The weights of these modules hold the values of the gguf package's Q8_0 of their floats."""
    for name, weight in floats.items():
        packed = [back[f"{name}.weight_{part}"] for part in ("packed", "scale")]
        blocks = gguf.quants.quantize(weight.float().numpy(), Type.Q8_0)
        wanted = gguf.quants.dequantize(blocks, Type.Q8_0)
        assert np.array_equal(dequantize(packed, *weight.shape).numpy(), wanted), name


def computes_the_same(folder: Path, quantized: Any) -> None:
    """`quantized`, with the tensors of the checkpoint in it, gives the checkpoint's logits to the bit.

    The packed tensors are compared elsewhere; the norms went through fp32 as 1 + weight: 2^-23 for weights below 3.
    """
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    norms = {name: p for name, p in quantized.named_parameters() if "norm" in name}
    assert len(norms) == 37 and all(p.abs().max() < 3 for p in norms.values())
    for name, p in norms.items():
        # and rounding to bf16 again moves a weight by half of 2^-8 at most, where fp32 moved it at all
        torch.testing.assert_close(model.get_parameter(name).float(), p.float(), atol=2.0**-23, rtol=2.0**-8)
    quantized.load_state_dict(model.state_dict())
    text = SAMPLE_TEXT.read_text(encoding="utf-8")[:2000]
    ids = AutoTokenizer.from_pretrained(TINY)(text, return_tensors="pt").input_ids[:, :64]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, quantized(ids).logits)


def test_bf16_gives_the_bytes_of_safetensors(folder: Path, tmp_path: Path) -> None:
    quantize_checkpoint(folder / "bf16/model.gguf", tmp_path / "gguf")
    quantize_checkpoint(TINY, tmp_path / "plain")
    ours, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("gguf", "plain"))
    assert ours.keys() == plain.keys()
    packed = [name for name in ours if "norm" not in name]  # norms lose what fp32 cannot hold of 1 + weight
    assert all(torch.equal(ours[name], plain[name]) for name in packed)


def rewrite(source: Path, target: Path, change: Callable[[str, Any], tuple[Any, Any]]) -> None:
    """Copy a GGUF file with the data (array, type) that `change(name, tensor)` gives for each tensor."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "gemma3")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind, *inner = field.types
            value = field.contents()
            writer.add_key_value(key, value, kind, inner[0] if inner else None)
    for tensor in reader.tensors:
        data, kind = change(tensor.name, tensor)
        writer.add_tensor(tensor.name, np.ascontiguousarray(data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", [Type.Q5_0, Type.Q3_K])
def test_other_types_are_requantized(folder: Path, tmp_path: Path, kind: Type) -> None:
    blocks = with_random_gate(folder, tmp_path, kind)
    result = quantize_checkpoint(tmp_path / "model.gguf", tmp_path / "out")
    assert result["notes"] == [f"1 weights stored as {kind.name} were dequantized and quantized again to w4g32"]
    ours = load_file(tmp_path / "out/model.safetensors")
    expected = quantize_weight(torch.from_numpy(gguf.quants.dequantize(blocks, kind)), "w4g32")
    prefix = "model.layers.1.mlp.gate_proj.weight"
    assert torch.equal(ours[f"{prefix}_packed"], expected[0]) and torch.equal(ours[f"{prefix}_scale"], expected[1])


def test_rules_count_more_than_what_is_stored(folder: Path, tmp_path: Path) -> None:
    result = quantize_checkpoint(folder / "q4", tmp_path / "out", rules={"q_proj": "w8c", "k_proj": None})
    schemes = {row["name"].split(".")[-2]: row["scheme"] for row in result["weights"]}
    assert (schemes["q_proj"], schemes["k_proj"], schemes["v_proj"]) == ("w8c", "float", "w4g32")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_config_beside_the_file(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "q4/model.gguf", tmp_path)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path)
    quantize_checkpoint(tmp_path / "model.gguf", tmp_path / "out")
    configs = [json.loads((path / "config.json").read_text()) for path in (tmp_path / "out", TINY)]
    configs[0].pop("quantization_config")
    assert configs[0] == configs[1]


def test_from_pretrained_then_compile(folder: Path) -> None:
    """transformers dequantizes the file; quantizing that again finds the levels of Q4_0."""
    model = AutoModelForCausalLM.from_pretrained(folder / "q4", gguf_file="model.gguf", dtype=torch.float32).eval()
    weight = model.model.layers[2].mlp.up_proj.weight.detach().clone()
    compiled = torch.compile(model, backend="unicorn")
    out = compiled.generate(torch.tensor([[2, 17, 900]]), max_new_tokens=2, do_sample=False)
    assert out.shape == (1, 5)
    module = model.model.layers[2].mlp.up_proj
    assert module.scheme == "w4g32" and torch.equal(dequantize(module.packed, *module.weight_shape), weight)


def test_infinite_scale(folder: Path, tmp_path: Path) -> None:
    def change(name: str, tensor: Any) -> tuple[Any, Any]:
        data = np.array(tensor.data)
        if name == "blk.0.ffn_up.weight":
            data[5, :2] = np.frombuffer(np.float16(np.inf).tobytes(), np.uint8)
        return data, tensor.tensor_type

    rewrite(folder / "q4/model.gguf", tmp_path / "model.gguf", change)
    with pytest.raises(QuantizationError, match=r"model\.gguf: tensor 'model\.layers\.0\.mlp\.up_proj\.weight'.*Inf"):
        quantize_checkpoint(tmp_path / "model.gguf", tmp_path / "out")


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def entry(name: bytes = b"w", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


ARCHITECTURE = text(b"general.architecture") + struct.pack("<I", 8) + text(b"gemma3")


def file(
    entries: list[bytes], metadata: bytes = b"", keys: int = 0, data: int = 128, tensors: int | None = None
) -> bytes:
    count = len(entries) if tensors is None else tensors
    head = b"GGUF" + struct.pack("<IQQ", 3, count, keys + 1) + ARCHITECTURE + metadata + b"".join(entries)
    return head + bytes(-len(head) % 32) + bytes(data)


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


NESTED = struct.pack("<IQ", 9, 1) * 100 + struct.pack("<IQ", 0, 0)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cannot be read"),
    "magic": (b"GGML" + bytes(100), "does not begin with GGUF"),
    "version": (b"GGUF" + struct.pack(">I", 3) + bytes(100), "version"),
    "tensor count": (file([entry()], tensors=2**62), "tensors do not fit"),
    "key count": (file([entry()], keys=2**40), "metadata entries do not fit"),
    "long string": (file([], struct.pack("<Q", 2**63), 1), "ends inside a metadata key"),
    "no text": (file([], key(b"\xff\xfe", 0, b"1"), 1), "not UTF-8"),
    "long array": (file([], key(b"a", 9, struct.pack("<IQ", 4, 2**61)), 1), "elements of 'a' do not fit"),
    "nested arrays": (file([], key(b"a", 9, NESTED), 1), "arrays in arrays"),
    "value type": (file([], key(b"a", 77, b""), 1), "unknown type 77"),
    "key twice": (file([], ARCHITECTURE, 1), "'general.architecture' twice"),
    "alignment 0": (file([entry()], key(b"general.alignment", 4, struct.pack("<I", 0)), 1), "alignment is 0"),
    "alignment 33": (file([entry()], key(b"general.alignment", 4, struct.pack("<I", 33)), 1), "alignment is 33"),
    "dimensions": (file([text(b"w") + struct.pack("<I", 9)]), "'w' has 9 dimensions"),
    "gigantic": (file([entry(shape=(2**40, 2**40, 2**40))]), "larger than the file"),
    "zero": (file([entry(shape=(0,))]), r"shape \[0\]"),
    "half a block": (file([entry(shape=(33,), kind=2)]), r"'w' of Q4_0 has shape \[33\]"),
    "tensor type": (file([entry(kind=999)]), "unknown type 999"),
    "misaligned": (file([entry(offset=7)]), "'w' is at 7"),
    "past the end": (file([entry(offset=2**40)]), "ends inside tensor 'w'"),
    "cut": (file([entry()], data=127), "ends inside tensor 'w'"),
    "overlap": (file([entry(b"a"), entry(b"b", offset=96)], data=256), "'b' overlaps"),
    "tensor twice": (file([entry(), entry(offset=128)], data=256), "'w' twice"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file(tmp_path: Path, case: str) -> None:
    data, message = HOSTILE[case]
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(tmp_path / "bad.gguf")
    assert "bad.gguf" in str(caught.value)


def test_good_file_of_the_same_kind(tmp_path: Path) -> None:
    (tmp_path / "good.gguf").write_bytes(file([entry(), entry(b"v", offset=128)], data=256))
    header = read_header(tmp_path / "good.gguf")
    assert header.architecture == "gemma3" and list(header.tensors) == ["w", "v"]
    assert torch.equal(header.tensors["v"].read(), torch.zeros(32))


def test_the_folder_stands_for_its_only_file(folder: Path, tmp_path: Path) -> None:
    by_folder, by_file = (models.load(name).state_dict() for name in (folder / "q4", folder / "q4/model.gguf"))
    assert all(torch.equal(by_folder[name], tensor) for name, tensor in by_file.items())
    assert models.load_tokenizer(folder / "q4")("word").input_ids == models.load_tokenizer()("word").input_ids
    with pytest.raises(CheckpointError, match=r"absent/model\.gguf: no such file or folder"):
        models.load(tmp_path / "absent/model.gguf")


def test_unusable_models(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other.gguf").write_bytes(file([entry()]).replace(b"gemma3", b"bert??"))
    with pytest.raises(CheckpointError, match=r"other\.gguf"):
        quantize_checkpoint(tmp_path / "other.gguf", tmp_path / "out")
    missing = tmp_path / "missing.gguf"
    rewrite(folder / "q4/model.gguf", missing, lambda n, t: (t.data, t.tensor_type))
    data = missing.read_bytes().replace(b"blk.3.ffn_up.weight", b"blk.3.ffn_UP.weight")
    missing.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"'blk\.3\.ffn_UP\.weight' belongs to no weight"):
        quantize_checkpoint(missing, tmp_path / "out")
