"""Which kernels a model needs: from its sizes to designs. Standard library only.

The default tiles are the largest that fit a core's memory with double buffering; none of them was ever timed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unicorn_backend.runtime.npu.designs import Attention, Design, Gemm, generation

TILE_K, TILE_N = 128, 64


def projection(target: str, k: int, n: int) -> Gemm:
    """Design of a projection [n, k]; sizes are rounded up, the padding is zeros."""
    step = TILE_N * generation(target).columns
    return Gemm(target, _round_up(k, TILE_K), _round_up(n, step))


def attention(target: str, head_dim: int) -> Attention:
    """Design for a head width: 512 keys per launch, in the block and row sizes that fit."""
    rows, keys = {64: (32, 64), 96: (32, 64), 128: (32, 64), 192: (16, 32), 256: (16, 32)}.get(head_dim, (16, 32))
    return Attention(target, head_dim, rows, keys, 512 // keys)


def of_model(config: Mapping[str, Any], target: str) -> list[Design]:
    """Every design that the layers of a Hugging Face config need. Raises KeyError for a config without heads."""
    text = config.get("text_config", config)
    hidden, heads = int(text["hidden_size"]), int(text["num_attention_heads"])
    kv_heads = int(text.get("num_key_value_heads") or heads)
    dim = int(text.get("head_dim") or hidden // heads)
    found: list[Design] = [
        projection(target, hidden, (heads + 2 * kv_heads) * dim),
        projection(target, heads * dim, hidden),
        attention(target, dim),
    ]
    return list(dict.fromkeys(found))


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
