"""Start-up test of a device: small feed-forwards against the CPU's kernels on this machine."""

from __future__ import annotations

from typing import Any

import torch

from unicorn_backend.layouts import GROUP, pack_w4g32

K, F, N = 96, 160, 64
TOKENS = (1, 3, 8, 70)  # every GEMV form is one shader compiled for several sizes; 70 is the GEMM with a rest
# Normalised mean squared error. One unit of an int8 activation that rounds the other way changes a result by some
# 1e-5 of it, squared 1e-10; a wrong lane, scale or barrier changes it by more than 1e-2, squared 1e-4.
LIMIT = 1e-6


def compare_with_cpu(device: Any) -> str:
    """Why `device` must not be used; "" if its results are the CPU's."""
    generator = torch.Generator().manual_seed(1)
    weights = [_weight(n, k, generator) for n, k in ((F, K), (F, K), (N, F))]
    norm = torch.rand(K, generator=generator) + 0.5
    post = torch.rand(N, generator=generator) + 0.5
    for tokens in TOKENS:
        x = torch.randn(tokens, K, generator=generator)
        residual = torch.randn(tokens, N, generator=generator)
        arguments = (x, norm, 1e-6, 0.0, *weights, [], "gelu_tanh", F, N, post, 1e-6, 0.0, residual)
        region = device.region("int4_ffn", arguments)
        result = region if isinstance(region, str) else region.run(arguments)
        if isinstance(result, str):
            return f"self-test: {result}"
        want = torch.ops.unicorn.int4_ffn(*arguments)
        error = float((result - want).square().mean() / want.square().mean())
        if not error <= LIMIT:
            return f"self-test failed: {tokens} tokens differ from the CPU's result (normalised error {error:.1e})"
    return ""


def _weight(n: int, k: int, generator: torch.Generator) -> list[torch.Tensor]:
    q = torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=generator)
    scale = torch.rand(n, -(-k // GROUP), generator=generator) * 0.02 + 0.001
    return pack_w4g32(q, scale.half())
