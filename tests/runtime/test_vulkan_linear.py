"""`linear` on Vulkan drivers: integers bit for bit, sums within a derived bound, in every variant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.runtime.test_vulkan_ffn import EPS, ROUNDING, read
from unicorn_backend import assets, reference
from unicorn_backend.layouts import GROUP, pack_w8, unpack

assets.load_native()


def weight(n: int, k: int, scheme: str, g: torch.Generator) -> list[Tensor]:
    q = torch.randint(0, 256, (n, k), dtype=torch.uint8, generator=g)
    zeros = torch.randint(0, 256, (n,), dtype=torch.uint8, generator=g) if scheme == "w8a" else None
    return pack_w8(q, (torch.rand(n, generator=g) + 0.1) / (128 * k**0.5), zeros)


def arguments(
    m: int, k: int, n: int, scheme: str = "w8a", dtype: Any = torch.bfloat16, bias: bool = False
) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(m + 7 * k + n)
    x = torch.randn(m, k, generator=g).mul(3).to(dtype)
    return (x, weight(n, k, scheme, g), torch.randn(n, generator=g).to(dtype) if bias else None, n)


def run(device: Any, args: tuple[Any, ...]) -> Tensor:
    region = device.region("linear", args)
    assert not isinstance(region, str), region
    y = region.run(args)
    assert isinstance(y, Tensor), y
    return y


def products(a: Tensor, a_scale: Tensor, w: list[Tensor], n: int, k: int) -> tuple[Tensor, Tensor]:
    """Exact product of int8 activations and a weight, fp64 [m, n], and how far a shader may be from it.

    Integers of a group are exact in parts of 4 columns, so that parts may be larger than their sum. A thread adds at
    most one part per group, then at most 32 threads are added, one after the other.
    """
    q, s, _ = unpack(w, n, k)
    values = torch.nn.functional.pad(q.double(), (0, -k % GROUP)).unflatten(1, (-1, GROUP))
    terms = torch.einsum("mgk,ngk->mng", a.double(), values) * a_scale.double()[:, None] * s.double()
    sizes = torch.einsum("mgk,ngk->mng", a.double().abs(), values.abs()) * a_scale.double()[:, None] * s.double()
    return terms.sum(-1), (a.shape[1] + 36) * EPS * sizes.sum(-1)


def check(device: Any, args: tuple[Any, ...]) -> None:
    from unicorn_backend.runtime.vulkan import linear

    x, w, bias, n = args
    m, k = x.shape
    y = run(device, args)
    assert y.shape == (m, n) and y.dtype == x.dtype
    kernels = device.kernels(linear.Call(*args).shape)
    groups = -(-k // GROUP)
    a, a_scale = (
        read(device, kernels._a, (m, groups, GROUP), torch.int8),
        read(device, kernels._a_scale, (m, groups), torch.float32),
    )

    # Quantization has no norm in front: quotient, product and rounding are IEEE's here and there, so bit for bit.
    want, want_scale = reference.quantize_activations(x)
    assert torch.equal(a, want) and torch.equal(a_scale, want_scale)

    product, error = products(a, a_scale, w, n, k)
    if bias is not None:
        product = product + bias.double()
    error = error + (ROUNDING[x.dtype] + 2 * EPS) * product.abs() + 1e-7
    assert ((y.double() - product).abs() <= error * 1.01).all()
    assert error.mean() < 0.02 * product.square().mean().sqrt(), "the tolerance must stay below the signal"

    cpu = torch.ops.unicorn.linear(*args).double()
    assert (y.double() - cpu).square().mean() <= 1e-5 * cpu.square().mean()


@pytest.mark.parametrize("variant", ["matrix", "dot8_subgroup", "dot8_shared", "int_subgroup", "int_shared"])
@pytest.mark.parametrize(("m", "scheme", "bias"), [(1, "w8a", False), (8, "w8c", True), (71, "w8a", True)])
def test_every_variant(devices: Any, physical: Any, variant: str, m: int, scheme: str, bias: bool) -> None:
    from unicorn_backend.runtime.vulkan import variants

    missing = next(v for v in variants.VARIANTS if v.name == variant).missing(physical.features)
    if missing:
        pytest.skip(f"{physical.name}: {missing}")
    check(devices(variant), arguments(m, 160, 192, scheme, bias=bias))


@pytest.mark.parametrize(
    ("m", "k", "n", "scheme", "dtype", "bias"),
    [
        (1, 50, 77, "w8a", torch.float32, True),  # nothing is a multiple of a tile
        (3, 33, 34, "w8c", torch.float16, False),
        (5, 96, 13, "w8c", torch.float32, False),
        (13, 70, 90, "w8c", torch.float16, True),
        (67, 40, 75, "w8a", torch.float32, False),
        (131, 64, 66, "w8a", torch.bfloat16, False),
    ],
)
def test_odd_shapes_and_types(devices: Any, m: int, k: int, n: int, scheme: str, dtype: Any, bias: bool) -> None:
    check(devices(), arguments(m, k, n, scheme, dtype, bias))


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1152, 8192), (7, 2560, 1024), (67, 1152, 1024)])
def test_sizes_of_gemma3(devices: Any, m: int, k: int, n: int) -> None:
    check(devices(), arguments(m, k, n))


@pytest.mark.parametrize("placing", ["mapped", "staged"])
@pytest.mark.parametrize("m", [1, 70])
def test_a_weight_larger_than_a_buffer_is_read_in_pieces(devices: Any, placing: str, m: int) -> None:
    args = arguments(m, 32, 9000, bias=True)
    whole = run(devices("", placing), args)
    device = devices("", placing, 256 * 512)  # 256 tiles of 16 rows: three pieces, the last one small
    assert torch.equal(run(device, args), whole)
    assert len(device._regions[id(args[1][0])].weights.lists[0]) == 3
    check(device, args)


def test_many_logits_come_in_pieces(devices: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from unicorn_backend.runtime.vulkan import linear

    args = arguments(150, 64, 96, dtype=torch.float32)
    whole = run(devices(), args)
    monkeypatch.setattr(linear, "OUT_BYTES", 64 * 96 * 4)
    assert torch.equal(run(devices("", "mapped"), args), whole)
    assert linear.Call(*args).shape.max_tokens == 64


def test_extreme_zero_points_and_values(devices: Any) -> None:
    x, (w, s, z), _, n = arguments(4, 64, 32, dtype=torch.float32)
    w[0, :, :, :8], w[0, :, :, 8:] = 255, 0
    z[0, :8], z[0, 8:] = 0, 255
    x[0], x[1], x[2, 5] = 0.0, 1e-38, float("nan")
    args = (x, [w, s, z], None, n)
    y, cpu = run(devices(), args), torch.ops.unicorn.linear(*args)
    assert (y[:2] == 0).all() and not y[2].isfinite().any()
    assert torch.allclose(y[3], cpu[3], rtol=1e-5, atol=1e-5) and cpu[3, :16].abs().min() > 0


def test_what_cannot_run_says_why(devices: Any) -> None:
    args = arguments(1, 64, 33)
    assert devices().region("linear", args) == "rows of 33 16-bit values do not end on a word"
    assert "torch.float64" in devices().region("linear", (args[0].double(), *args[1:]))
