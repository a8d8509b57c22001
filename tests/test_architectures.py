"""Structure only: models of several families, built from their transformers configs with random weights.

Every attention and gated feed-forward must be matched, through classes the matcher has never heard of,
and the compiled model must give eager's logits within bf16 rounding (recipe "none").
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import unicorn_backend
from tests.counting import watch
from tests.scripts import ROOT, load

LAYERS = 2
BASE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Gemma3": {"head_dim": 256, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "Gemma3-8:4": {"head_dim": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "sliding_window": 16},
    "Gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 32},
    "Gemma": {},
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Mistral": {"sliding_window": 16},
    "Phi3": {},
    "Granite": {},
    "SmolLM3": {},
    "Glm": {"head_dim": 64},  # half of each head is rotated, pairs are neighbours
    "Cohere": {},  # pairs are neighbours, in fp32
    "StableLm": {},  # a quarter of each head
}
# q, k and v in one op as well; elsewhere the projections stay single ops, with a printed reason
FUSED_QKV = set(FAMILIES)


def build(family: str) -> Any:
    import transformers

    name = family.partition("-")[0]
    config_class = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    values = BASE | FAMILIES[family]
    if name in ("Phi3", "Granite", "SmolLM3", "Qwen2", "Cohere", "StableLm"):
        values.pop("head_dim")
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config_class(**values)).to(torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_region_is_matched_and_right(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family)
    ids = torch.randint(3, 500, (1, 21), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = model(ids).logits.float()
    compiled = torch.compile(model, backend="unicorn", options={"recipe": "none"})
    with watch(monkeypatch) as ran, torch.no_grad():
        got = compiled(ids).logits.float()
    kinds = [step.kind for step in ran.plans[0].steps]
    assert kinds.count("attention") == LAYERS and kinds.count("ffn") == LAYERS, ran.plans[0].left
    assert kinds.count("qkv") == (LAYERS if family in FUSED_QKV else 0), ran.plans[0].left
    assert ran.calls["int8_attention"] == ran.calls["int4_ffn"] == LAYERS
    bound = (4 * LAYERS + 2) * 2**-8 * want.abs().max()  # two roundings per residual add, and the head's
    assert (got - want).abs().max() <= bound < 3 * want.std()


def test_sparse_layers_of_gemma_3n(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of four layers keep the 5 % largest gates of a token, as eager computes them."""
    import transformers

    sizes = {"vocab_size": 512, "vocab_size_per_layer_input": 512, "hidden_size": 64, "intermediate_size": 1024}
    layers = {"num_hidden_layers": 4, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0]}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "hidden_size_per_layer_input": 16}
    config = transformers.Gemma3nTextConfig(**sizes, **layers, **heads, laurel_rank=16)
    torch.manual_seed(0)
    model = transformers.Gemma3nForCausalLM(config).eval()
    ids = torch.randint(3, 500, (1, 21))
    with torch.no_grad():
        want = model(ids).logits
    compiled = torch.compile(model, backend="unicorn", options={"recipe": "none"})
    with watch(monkeypatch) as ran, torch.no_grad():
        got = compiled(ids).logits
    assert (ran.calls["sparse_ffn"], ran.calls["int4_ffn"]) == (2, 2), ran.plans[0].left
    assert (got - want).abs().max() < 1e-4 * want.abs().max()


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Phi3"])
def test_default_recipe_generates(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family)
    compiled = torch.compile(model, backend="unicorn")
    ids = torch.randint(3, 500, (2, 9), generator=torch.Generator().manual_seed(1))
    with watch(monkeypatch) as ran:
        tokens = compiled.generate(ids, max_new_tokens=4, do_sample=False)
    assert tokens.shape == (2, 13)
    schemes = {step.kind: set(step.schemes) for plan in ran.plans for step in plan.steps}
    assert schemes["ffn"] == {"w4g32"} and schemes["attention"] == {"w8c"} and schemes["qkv"] == {"w8c"}
    assert ran.graphs == 2 and ran.calls["int4_ffn"] == LAYERS * 4


def test_what_is_not_gated_runs_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Starcoder2Config, Starcoder2ForCausalLM

    values = {k: v for k, v in BASE.items() if k != "head_dim"}
    model = Starcoder2ForCausalLM(Starcoder2Config(**values)).to(torch.bfloat16).eval()
    with watch(monkeypatch) as ran, torch.no_grad():
        torch.compile(model, backend="unicorn")(torch.arange(3, 9).unsqueeze(0))
    plan = ran.plans[0]
    assert [left.reason for left in plan.left if left.kind == "ffn"] == [
        "the gelu_tanh of a projection is not multiplied by a second projection (not gated)"
    ] * LAYERS
    assert sum(step.kind == "linear" for step in plan.steps) == 2 * LAYERS + 1, "its projections are still ours"


@pytest.mark.parametrize(
    "model_type",
    [
        "gptj",  # queries and keys rotated in fp32, values in bf16
        "olmo",  # no parameter but linears
        "qwen3_moe",  # routers stay float
        "mamba",  # computes with the weight of a projection itself
    ],
)
def test_what_is_left_runs_as_torch_does(model_type: str) -> None:
    row = load(ROOT / "benchmarks" / "models.py").examine(model_type, {})
    assert row.get("tokens_fp32", row["tokens"]) == "equal" and row["taken"]["linear"] > 0, row


@pytest.fixture
def multimodal() -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = BASE | {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"], "vocab_size": 600}
    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 56, "patch_size": 14}
    torch.manual_seed(0)
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=590, boi_token_index=591
    )
    model = Gemma3ForConditionalGeneration(config).to(torch.bfloat16).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "language_model" in name and parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)  # as transformers makes them, attention hardly shows
    model.generation_config.eos_token_id = None
    return model


def test_text_and_image(multimodal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text model is quantized, the vision tower and projector stay bf16, and both run; so does the image prompt."""
    from unicorn_backend.quantize.modules import QuantLinear

    ids = torch.tensor([[3, 591, 590, 590, 590, 590, 7, 8, 9]])
    image = {"pixel_values": torch.randn(1, 3, 56, 56, dtype=torch.bfloat16), "token_type_ids": (ids == 590).long()}
    with torch.no_grad():
        want = multimodal(ids, **image).logits.float()
        eager = unicorn_backend.quantize(multimodal)(ids, **image).logits.float()
        causal = multimodal(ids, pixel_values=image["pixel_values"]).logits.float()
    compiled = torch.compile(multimodal, backend="unicorn")
    with watch(monkeypatch) as ran, torch.no_grad():
        got = compiled(ids, **image).logits.float()
        tokens = compiled.generate(ids, **image, max_new_tokens=4, do_sample=False)
        text_only = compiled.generate(ids[:, 5:], max_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, 13) and text_only.shape == (1, 8)
    towers = [m for name, m in multimodal.named_modules() if "vision" in name or "projector" in name]
    assert towers and not any(isinstance(module, QuantLinear) for module in towers)
    assert ran.calls["int4_ffn"] == LAYERS * (1 + 4 + 4), "prompts with the image and their decode steps, text alone"
    assert not any(plan.note for plan in ran.plans)
    error = (got - want).pow(2).mean() / want.pow(2).mean()
    assert error < 0.05, "int4 weights of random models: about 1 % relative error energy per projection"
    assert (got - eager).pow(2).mean() < 0.1 * (causal - eager).pow(2).mean(), "tokens of an image see each other"
