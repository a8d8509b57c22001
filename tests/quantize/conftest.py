"""Fixtures of the quantization tests. They run without the native library, on the plain-torch ops."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from unicorn_backend.quantize.schemes import ensure_kernels


def has_kernel(name: str) -> bool:
    """True if op `name` has a CPU kernel of its own."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"unicorn::{name}", "CPU")


@pytest.fixture(scope="session", autouse=True)
def kernels() -> None:
    """The native kernels; without them the reference runs the ops."""
    ensure_kernels()


@pytest.fixture
def native() -> None:
    """Skip where the native quantizer is not built."""
    if not has_kernel("quantize_w4g32"):
        pytest.skip("the native library is not built")


class Ffn(nn.Module):
    def __init__(self, width: int, wide: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, wide, bias=False)
        self.up_proj = nn.Linear(width, wide, bias=False)
        self.down_proj = nn.Linear(wide, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        out: torch.Tensor = self.o_proj(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return out


class Small(nn.Module):
    """A language model without transformers: table, attention, gated feed-forward, tied or own head."""

    def __init__(self, tied: bool = True, vocabulary: int = 50, width: int = 40, wide: int = 72) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, width)
        self.self_attn = Attention(width)
        self.mlp = Ffn(width, wide)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(ids)
        x = x + self.self_attn(x)
        out: torch.Tensor = self.lm_head(x + self.mlp(x))
        return out


@pytest.fixture
def small() -> Small:
    """fp32, tied, evaluation mode; every size is no multiple of a tile."""
    return Small().eval()


@pytest.fixture
def untied() -> Small:
    return Small(tied=False).eval()
