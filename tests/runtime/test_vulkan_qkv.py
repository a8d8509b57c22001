"""`int8_qkv` on Vulkan drivers, stage by stage with derived bounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.support import Approx, assert_within, norm
from tests.ops.test_regions import rotated
from tests.runtime.test_vulkan_ffn import EPS, check_quantized, read
from tests.runtime.test_vulkan_linear import products, weight
from unicorn_backend import assets, reference
from unicorn_backend.layouts import GROUP

assets.load_native()


def arguments(
    b: int, t: int, k: int, dims: tuple[int, int, int], dtype: Any = torch.bfloat16, scheme: str = "w8c", **on: Any
) -> tuple[Any, ...]:
    """dims: heads, kv_heads, head_dim; `on`: pre, norm, turned, bias, interleaved, v_norm, angles, shared."""
    g = torch.Generator().manual_seed(t + k)
    heads, kv_heads, d = dims
    rows = [heads * d, kv_heads * d, kv_heads * d]
    pre = ((torch.rand(k, generator=g) - 0.5).to(dtype), 1e-6, 1.0) if on.get("pre", True) else (None, None, 0.0)
    norms = (*(torch.rand(2, d, generator=g) - 0.5).to(dtype), 1e-6, 1.0)
    angle = torch.rand(1 if on.get("shared", True) else b, t, on.get("turned", d), generator=g) * 6
    angles = [f(angle).to(on.get("angles", dtype)) for f in (torch.cos, torch.sin)]
    return (
        torch.randn(b, t, k, generator=g).mul(3).to(dtype),
        *pre,
        *(weight(n, k, scheme, g) for n in rows),
        [torch.randn(n, generator=g) for n in rows] if on.get("bias") else [],
        *(norms if on.get("norm", True) else (None, None, None, 0.0)),
        *(angles if on.get("turned", d) else (None, None)),
        *dims,
        on.get("interleaved", False),
        on.get("v_norm", False),
    )


def run(device: Any, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    region = device.region("int8_qkv", args)
    assert not isinstance(region, str), region
    found: Any = region.run(args)
    assert isinstance(found, tuple), found
    return found


def check(device: Any, args: tuple[Any, ...]) -> None:
    from unicorn_backend.runtime.vulkan import qkv

    call = qkv.Call(*args)
    found, cpu = run(device, args), torch.ops.unicorn.int8_qkv(*args)
    kernels = device.kernels(call.shape)
    b, t, k = call.x.shape
    groups, d = -(-k // GROUP), call.head_dim
    a = read(device, kernels._a, (b * t, groups, GROUP), torch.int8)
    a_scale = read(device, kernels._a_scale, (b * t, groups), torch.float32)
    h = reference.normed(call.x.double().flatten(0, 1), call.norm_w, call.norm_eps, call.norm_offset)
    check_quantized(a, a_scale, h, h.abs() * ((k / 256 + 16) * EPS))

    norms = (call.q_norm_w, call.k_norm_w, None)
    eps = (call.qk_norm_eps, call.qk_norm_eps, call.qk_norm_eps if call.v_norm else None)
    for i, (y, want) in enumerate(zip(found, cpu, strict=True)):
        assert y.shape == want.shape and y.dtype == want.dtype and y.is_contiguous()
        n = want.shape[1] * d
        value, error = products(a, a_scale, call.lists[i], n, k)
        exact = Approx(value, error).plus(call.bias[i] if call.bias else None)
        parts = [part.view(b, t, -1, d).transpose(1, 2) for part in (exact.value, exact.error)]
        exact = norm(Approx(*parts), norms[i], eps[i], call.qk_norm_offset)
        exact = rotated(exact, call.cos, call.sin, call.interleaved) if i < 2 else exact
        # tests/ops derives these bounds for 16 lanes and IEEE's division; a shader's may be 2.5 units off, and its
        # fp32 [16-bit] results are rounded once more
        assert_within(y, Approx(exact.value, exact.error + 4 * EPS * exact.value.abs() + 1e-30))
        assert (y.double() - want.double()).square().mean() <= 1e-5 * want.double().square().mean()


@pytest.mark.parametrize("m", [1, 3, 8, 71])
def test_gemma3_shapes(devices: Any, m: int) -> None:
    check(devices(), arguments(1, m, 160, (4, 1, 64)))


@pytest.mark.parametrize(
    ("b", "t", "k", "dims", "dtype", "scheme", "on"),
    [
        (1, 1, 50, (3, 1, 20), torch.float32, "w8a", {"bias": True, "norm": False}),  # nothing is a multiple of a tile
        (2, 3, 64, (2, 2, 40), torch.float16, "w8c", {"turned": 8, "interleaved": True, "v_norm": True}),
        (2, 37, 64, (3, 1, 40), torch.float16, "w8c", {"turned": 34, "bias": True, "shared": False}),
        (1, 5, 70, (2, 1, 7), torch.float32, "w8c", {"turned": 0, "pre": False}),
        (1, 2, 96, (1, 1, 512), torch.bfloat16, "w8c", {"angles": torch.float32}),
    ],
)
def test_everything_that_the_contract_allows(
    devices: Any, b: int, t: int, k: int, dims: tuple[int, int, int], dtype: Any, scheme: str, on: Any
) -> None:
    check(devices(), arguments(b, t, k, dims, dtype, scheme, **on))


def test_the_shared_memory_variant(devices: Any) -> None:
    check(devices("int_shared"), arguments(1, 2, 96, (2, 1, 32)))


def test_long_prompts_go_in_pieces(devices: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from unicorn_backend.runtime.vulkan import kernels

    args = arguments(2, 75, 64, (2, 1, 32), shared=False)
    whole = run(devices(), args)
    monkeypatch.setattr(kernels, "MAX_TOKENS", 64)
    assert all(torch.equal(y, w) for y, w in zip(run(devices("", "mapped"), args), whole, strict=True))


def test_what_cannot_run_says_why(devices: Any) -> None:
    args = list(arguments(1, 2, 64, (2, 1, 32)))
    args[12] = args[12].float()
    assert "cos and sin are torch.float32 and torch.bfloat16" in devices().region("int8_qkv", args)
    assert "heads of 7" in devices().region("int8_qkv", arguments(1, 2, 64, (2, 1, 7), turned=6))
