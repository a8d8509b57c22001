"""Start-up test of a device: small regions of every kind against the CPU's kernels on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from unicorn_backend.layouts import GROUP, pack_w4g32, pack_w8

K, F, N = 96, 160, 64
TOKENS = (1, 3, 8, 70)  # every GEMV form is one shader compiled for several sizes; 70 is the GEMM with a rest
# Normalised mean squared error. One unit of an int8 activation that rounds the other way changes a result by some
# 1e-5 of it, squared 1e-10; a wrong lane, scale or barrier changes it by more than 1e-2, squared 1e-4.
LIMIT = 1e-6


def compare_with_cpu(device: Any) -> str:
    """Why `device` must not be used; "" if its results are the CPU's."""
    for op, tokens, arguments in _cases():
        region = device.region(op, arguments)
        result = region if isinstance(region, str) else region.run(arguments)
        if isinstance(result, str):
            return f"self-test: {result}"
        want = getattr(torch.ops.unicorn, op)(*arguments)
        if op == "int8_qkv":
            result, want = (torch.cat([part.flatten() for part in parts]) for parts in (result, want))
        error = float((result - want).square().mean() / want.square().mean())
        if not error <= LIMIT:
            found = f"{op} of {tokens} tokens differs from the CPU's result (normalised error {error:.1e})"
            return f"self-test failed: {found}"
    return ""


def _cases() -> Iterator[tuple[str, int, tuple[Any, ...]]]:
    """(op, tokens, arguments)."""
    g = torch.Generator().manual_seed(1)
    ffn = [_w4g32(n, k, g) for n, k in ((F, K), (F, K), (N, F))]
    pre, post, bias = (torch.rand(n, generator=g) + 0.5 for n in (K, N, F))
    head, linear, values = _w8(F, K, g, zero=True), _w8(F, K, g, zero=False), _w8(32, K, g, zero=False)
    heads = (5, 1, 32, False, True)
    ones = torch.ones(32)
    for tokens in TOKENS:
        x, residual = torch.randn(tokens, K, generator=g), torch.randn(tokens, N, generator=g)
        yield "int4_ffn", tokens, (x, pre, 1e-6, 0.0, *ffn, [], "gelu_tanh", F, N, post, 1e-6, 0.0, residual)
        yield "linear", tokens, (x, head, None, F)
        yield "linear", tokens, (x, linear, bias, F)
        angle = torch.rand(1, tokens, 32, generator=g) * 6
        qkv: tuple[Any, ...] = (linear, values, values, [], ones, ones, 1e-6, 0.0, angle.cos(), angle.sin(), *heads)
        yield "int8_qkv", tokens, (x[None], pre, 1e-6, 0.0, *qkv)


def _w4g32(n: int, k: int, generator: torch.Generator) -> list[torch.Tensor]:
    q = torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=generator)
    scale = torch.rand(n, -(-k // GROUP), generator=generator) * 0.02 + 0.001
    return pack_w4g32(q, scale.half())


def _w8(n: int, k: int, generator: torch.Generator, zero: bool) -> list[torch.Tensor]:
    q = torch.randint(0, 256, (n, k), dtype=torch.uint8, generator=generator)
    zeros = torch.randint(0, 256, (n,), dtype=torch.uint8, generator=generator) if zero else None
    return pack_w8(q, torch.rand(n, generator=generator) * 0.002 + 0.0001, zeros)
