"""GGUF files of other models than Gemma 3: what transformers and our own reader make of them is the model written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from unicorn_backend import quantize_checkpoint, verify
from unicorn_backend.errors import CheckpointError
from unicorn_backend.formats import gguf_tokenizer
from unicorn_backend.formats.gguf_metadata import head_dim, llama3_factors
from unicorn_backend.layouts import dequantize
from unicorn_backend.quantize import stream
from unicorn_backend.quantize.modules import QuantEmbedding, QuantLinear

VOCABULARY = 300
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "head_dim": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16384, "rms_norm_eps": 1e-5,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
GEMMA2 = {"query_pre_attn_scalar": 64, "sliding_window": 16}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("gemma2", GEMMA2),
    "llama": ("llama", {"tie_word_embeddings": False, "attention_bias": True}),
    "llama 3.2": ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama, linear": ("llama", {"rope_parameters": LINEAR}),
    "mistral": ("mistral", {"sliding_window": None, "tie_word_embeddings": False}),
    "qwen2": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True, "head_dim": 128}),
}
WORD = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}"
END = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"


def tokenizer(pattern: str = WORD + "{1,3}" + END, ignore_merges: bool = True) -> Tokenizer:
    """Byte-level BPE with two merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", "<pad>", *alphabet, "he", "hel"]
    model = models.BPE(
        {token: i for i, token in enumerate(tokens)}, [("h", "e"), ("he", "l")], ignore_merges=ignore_merges
    )
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    return made


def make(folder: Path, kind: str, **extra: Any) -> Any:
    """A random model, saved with its tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **extra})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():  # norms and biases that differ
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.copy_(torch.randn(p.shape) * 0.1 + float("norm" in name and kind != "gemma2"))
    model.save_pretrained(folder)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer(), bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(folder)
    return model


def packed_weights(model: Any) -> dict[str, torch.Tensor]:
    """Every parameter, the packed ones by their values."""
    found = {name: p.detach().float() for name, p in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, (QuantLinear, QuantEmbedding)):
            found[f"{name}.weight"] = dequantize(module.packed, *module.weight_shape)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Blocks of a few rows; then transformers' own reader finds the values that ours finds, near the model's."""
    monkeypatch.setattr(stream, "BLOCK_BYTES", 20000)
    kind, extra = MODELS[name]
    model = make(tmp_path / "float", kind, **extra)
    rules = {r"layers\.1\..*[qk]_proj": None}  # a float copy of whole heads
    quantize_checkpoint(tmp_path / "float", tmp_path / "gguf", "q4", format="gguf", rules=rules)
    assert verify(tmp_path / "gguf") == []
    assert quantize_checkpoint(tmp_path / "gguf/model.gguf", tmp_path / "back", rules=rules)["notes"] == []
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "gguf", gguf_file="model.gguf", dtype=torch.float32).eval()
    got, wanted = packed_weights(ours), packed_weights(theirs)
    for key, original in model.named_parameters():
        ratio = (got[key] - original.float()).norm() / original.float().norm()
        assert ratio < (0.11 if original.dim() == 2 else 0.005), key  # 4 bits, rounding to bf16
        if key in wanted or not key.endswith(".bias"):  # transformers gives Llama no biases
            assert (got[key] - wanted[key]).norm() <= 0.005 * wanted[key].norm(), key
    for key in ("rope_parameters", "sliding_window", "attn_logit_softcapping", "query_pre_attn_scalar"):
        assert getattr(ours.config, key, None) == getattr(model.config, key, None), key
    assert head_dim(ours.config) == head_dim(model.config)
    ids = torch.randint(3, VOCABULARY - 40, (1, 40))
    with torch.no_grad():
        logits, expected = ours(ids).logits.float(), model(ids).logits.float()
    error = float((logits - expected).norm() / expected.norm())
    assert error < 0.3, error  # random 4-bit layers; heads in the wrong order or norms without their 1 make it above 1


def test_metadata(tmp_path: Path) -> None:
    """Keys and the rotary table as convert_hf_to_gguf.py writes them for Llama 3.2."""
    make(tmp_path / "float", *[MODELS["llama 3.2"][0]], **MODELS["llama 3.2"][1])
    quantize_checkpoint(tmp_path / "float", tmp_path / "gguf", format="gguf")
    reader = gguf.GGUFReader(tmp_path / "gguf/model.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama" and fields["llama.rope.dimension_count"] == 64
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == "llama-bpe"
    assert fields["tokenizer.ggml.merges"] == ["h e", "he l"] and fields["tokenizer.ggml.tokens"][3:5] == ["!", '"']
    assert (
        fields["tokenizer.ggml.token_type"][0] == gguf.TokenType.CONTROL and len(fields["tokenizer.ggml.tokens"]) == 300
    )
    stored = next(tensor for tensor in reader.tensors if tensor.name == "rope_freqs.weight")
    factors = torch.from_numpy(stored.data.copy())
    assert factors[0] == 1 and factors[-1] == 32 and factors.shape == (32,)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "float").model.rotary_emb.inv_freq
    plain = 500000.0 ** (-torch.arange(0, 64, 2) / 64)
    torch.testing.assert_close(plain / factors, expected, rtol=1e-5, atol=0)


def test_an_unknown_rotary_table(tmp_path: Path) -> None:
    """Never read as if it were not there."""
    make(tmp_path / "float", "llama", rope_parameters={**LLAMA3, "high_freq_factor": 9.0})
    quantize_checkpoint(tmp_path / "float", tmp_path / "gguf", format="gguf")
    with pytest.raises(CheckpointError, match=r"scaled in a way that is not read.*put the model's config\.json beside"):
        quantize_checkpoint(tmp_path / "gguf/model.gguf", tmp_path / "back")
    (tmp_path / "gguf/config.json").write_bytes((tmp_path / "float/config.json").read_bytes())
    quantize_checkpoint(tmp_path / "gguf/model.gguf", tmp_path / "back")
    rope = json.loads((tmp_path / "back/config.json").read_text())["rope_parameters"]
    assert rope["high_freq_factor"] == 9.0


@pytest.mark.parametrize(
    ("kind", "extra", "message"),
    [
        ("gemma2", {**GEMMA2, "query_pre_attn_scalar": 100}, "query_pre_attn_scalar 100, llama.cpp takes 64"),
        ("gemma2", {**GEMMA2, "layer_types": ["full_attention"] * 4}, "do not slide in turn"),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}, "rotary embedding"),
        ("phi", {}, "writes text models of gemma2, gemma3_text, llama"),
    ],
)
def test_refused(tmp_path: Path, kind: str, extra: dict[str, Any], message: str) -> None:
    make(tmp_path / "float", kind, **extra)
    with pytest.raises(CheckpointError, match=message):
        quantize_checkpoint(tmp_path / "float", tmp_path / "gguf", format="gguf")


@pytest.mark.parametrize(
    ("pattern", "ignore_merges", "name"),
    [
        (WORD + "{1,3}" + END, True, "llama-bpe"),
        (WORD + "{1,3}" + END, False, "smaug-bpe"),
        (WORD + END, False, "qwen2"),
        ("\\p{L}+", False, None),
    ],
)
def test_splitters(tmp_path: Path, pattern: str, ignore_merges: bool, name: str | None) -> None:
    data = json.loads(tokenizer(pattern, ignore_merges).to_str())
    if name is not None:
        assert gguf_tokenizer._splitter(tmp_path, data) == name
        return
    with pytest.raises(CheckpointError, match=r"splits text by .* llama-bpe, qwen2"):
        gguf_tokenizer._splitter(tmp_path, data)


def test_factors_of_llama3() -> None:
    """Long waves stretched by the factor, short ones not, a ramp between."""
    values = llama3_factors(LLAMA3, 128)
    assert values[0] == 1 and values[-1] == 32 and bool((values.diff() >= 0).all())
