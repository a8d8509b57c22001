"""Gemma 3 text models of the true sizes with random weights: for measuring speed, not quality.

Every matrix is drawn from N(0, 1/K), so activations keep their scale through the layers and nothing
overflows; the norms are the identity. The vocabulary tables are N(0, 1/K) too, as the embedding is
multiplied by sqrt(K) in the model.
"""

from __future__ import annotations

from typing import Any

import torch

# Shapes from the published config.json of google/gemma-3-1b-it, 4b, 12b and 27b (text part).
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3-1b": dict(
        hidden_size=1152,
        intermediate_size=6912,
        num_hidden_layers=26,
        num_attention_heads=4,
        num_key_value_heads=1,
        vocab_size=262144,
        sliding_window=512,
    ),
    "gemma3-4b": dict(
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=34,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=262208,
        sliding_window=1024,
    ),
    "gemma3-12b": dict(
        hidden_size=3840,
        intermediate_size=15360,
        num_hidden_layers=48,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=262208,
        sliding_window=1024,
    ),
    "gemma3-27b": dict(
        hidden_size=5376,
        intermediate_size=21504,
        num_hidden_layers=62,
        num_attention_heads=32,
        num_key_value_heads=16,
        head_dim=128,
        query_pre_attn_scalar=168,
        vocab_size=262208,
        sliding_window=1024,
    ),
}


def config(name: str, **changes: Any) -> Any:
    """`Gemma3TextConfig` of a known size: five sliding layers to one full layer, head dim 256 unless it says so."""
    from transformers import Gemma3TextConfig

    shape = {**CONFIGS[name], **changes}
    kinds = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(shape["num_hidden_layers"])]
    return Gemma3TextConfig(
        **{"head_dim": 256, "query_pre_attn_scalar": 256, **shape},
        hidden_activation="gelu_pytorch_tanh",
        layer_types=kinds,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    )


def random_model(name: str, seed: int = 0, **changes: Any) -> Any:
    """The named model in bf16, evaluation mode; `changes` override config fields (tests use fewer layers)."""
    from transformers import Gemma3ForCausalLM

    with torch.device("meta"):
        model = Gemma3ForCausalLM(config(name, **changes)).to(torch.bfloat16)
    rotary = type(model.model.rotary_emb)(model.config)  # its buffers are computed, not drawn
    model.to_empty(device="cpu")
    model.model.rotary_emb = rotary
    model.tie_weights()
    _draw(model, seed)
    if isinstance(scale := getattr(model.model.embed_tokens, "embed_scale", None), torch.Tensor):
        scale.fill_(model.config.hidden_size**0.5)
    return model.eval()


@torch.no_grad()
def _draw(model: Any, seed: int) -> None:
    """Matrices from N(0, 1/K); vectors (norm weights, stored as weight - 1 by Gemma) zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
        else:
            parameter.zero_()
