"""`int4_ffn` on Vulkan drivers, stage by stage with derived bounds, in every variant.

Each stage is compared with exact arithmetic on what the stage before it really wrote, so that an int8 value that was
rounded the other way (within the error of its fp32 input) does not blur the next stage's bound.
"""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

from unicorn_backend import assets, reference
from unicorn_backend.layouts import GROUP, pack_w4g32, unpack_w4g32

assets.load_native()

EPS = 2.0**-23
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half a unit, relative


def weight(n: int, k: int, generator: torch.Generator) -> list[Tensor]:
    q = torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=generator)
    scale = (torch.rand(n, -(-k // GROUP), generator=generator) + 0.1) / (8 * k**0.5)
    return pack_w4g32(q, scale.half())


def arguments(
    m: int,
    k: int,
    f: int,
    n: int,
    act: str = "gelu_tanh",
    dtype: Any = torch.bfloat16,
    norms: bool = True,
    own: bool = False,
) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(m + 7 * k + f)
    x = torch.randn(m, k, generator=g).mul(3).to(dtype)
    residual = torch.randn(m, n, generator=g).to(dtype) if own else x if n == k else None
    pre, post = ((torch.rand(w, generator=g) - 0.5).to(dtype) if norms else None for w in (k, n))
    eps = 1e-6 if norms else None
    weights = [weight(f, k, g), weight(f, k, g), weight(n, f, g)]
    return (x, pre, eps, 1.0, *weights, [], act, f, n, post, eps, 1.0, residual)


def run(device: Any, args: tuple[Any, ...]) -> Tensor:
    region = device.region("int4_ffn", args)
    assert not isinstance(region, str), region
    y = region.run(args)
    assert not isinstance(y, str), y
    return y


def read(device: Any, buffer: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What is in a device buffer, which a discrete GPU may have out of the CPU's reach."""
    from unicorn_backend.runtime.vulkan.logical import DOWNLOAD

    out, logical = torch.empty(shape, dtype=dtype), device._device
    seen = logical.buffer(out.nbytes, DOWNLOAD)
    copy = logical.record_copy(buffer, seen, out.nbytes)
    logical.run(copy)
    ctypes.memmove(out.data_ptr(), seen.address, out.nbytes)
    logical.forget(copy)
    logical.free(seen)
    return out


def check_quantized(q: Tensor, scale: Tensor, exact: Tensor, error: Tensor) -> None:
    """int8 `q` [M, G, 32] and `scale` [M, G] are those of `exact` [M, K] fp64, known up to `error` [M, K]."""
    groups = [torch.nn.functional.pad(t, (0, -t.shape[1] % GROUP)).unflatten(1, (-1, GROUP)) for t in (exact, error)]
    amax, worst = groups[0].abs().amax(-1), groups[1].amax(-1)
    assert ((scale.double() * 127 - amax).abs() <= worst + 4 * EPS * amax).all()
    steps = 127 / amax.clamp_min(1e-30)
    t = groups[0] * steps[..., None]
    slack = groups[1] * steps[..., None] + t.abs() * ((worst / amax.clamp_min(1e-30))[..., None] + 4 * EPS)
    assert ((q.double() - t).abs() <= 0.5 + slack).all()
    assert slack.mean() < 0.02, "the tolerance must stay below the step"
    assert (q != torch.round(t)).double().mean() < 0.01


def sums(q: Tensor, scale: Tensor, w: list[Tensor], n: int, k: int) -> tuple[Tensor, Tensor]:
    """Exact product of int8 activations and a weight, fp64 [M, n], and its sum of absolute terms."""
    wq, ws = unpack_w4g32(w[0], w[1], n, k)
    values = torch.nn.functional.pad(wq.double(), (0, -k % GROUP)).unflatten(1, (-1, GROUP))
    terms = torch.einsum("mgk,ngk->mng", q.double(), values) * scale.double()[:, None] * ws.double()
    return terms.sum(-1), terms.abs().sum(-1)


def check(device: Any, args: tuple[Any, ...]) -> None:
    """Every stage of one call."""
    x, pre, eps, offset, wg, wu, wd, _, act, f, n, post, post_eps, post_offset, residual = args
    m, k = x.shape
    y = run(device, args)
    from unicorn_backend.runtime.vulkan import ffn

    kernels = device.kernels(ffn.Call(*args).shape)
    gk, gf = -(-k // GROUP), -(-f // GROUP)
    a, a_scale = (
        read(device, kernels._a, (m, gk, GROUP), torch.int8),
        read(device, kernels._a_scale, (m, gk), torch.float32),
    )
    p, p_scale = (
        read(device, kernels._p, (m, gf, GROUP), torch.int8),
        read(device, kernels._p_scale, (m, gf), torch.float32),
    )

    h = reference.normed(x.double(), pre, eps, offset)
    check_quantized(a, a_scale, h, h.abs() * ((k / 256 + 16) * EPS))  # k / 256 squares per thread, then a tree

    gate, gate_size = sums(a, a_scale, wg, f, k)
    up, up_size = sums(a, a_scale, wu, f, k)
    chain = (gk + 12) * EPS  # one rounding per group or quarter group, and those of each term
    activated = reference.ACTIVATIONS[act](gate)
    by_gate = 1.13 * chain * gate_size + 3e-6 * activated.abs() + 4e-7 * gate.abs()  # slope of GELU is at most 1.13
    error = by_gate * up.abs() + (activated.abs() + by_gate) * chain * up_size + EPS * (activated * up).abs()
    check_quantized(p, p_scale, activated * up, error)

    want, size = sums(p, p_scale, wd, n, f)
    error = (gf + 12) * EPS * size
    if post_eps is not None:
        inverse = torch.rsqrt(want.square().mean(-1, keepdim=True) + post_eps)
        slip = (want.abs() * error).sum(-1, keepdim=True) / want.square().sum(-1, keepdim=True) + (n / 256 + 16) * EPS
        factor = inverse * (1.0 if post is None else post.double() + post_offset)
        want, error = want * factor, (error + want.abs() * slip) * factor.abs()
    if residual is not None:
        want = want + residual.double()
    error = error + (ROUNDING[x.dtype] + 2 * EPS) * want.abs() + 1e-7
    assert ((y.double() - want).abs() <= error * 1.01).all()
    assert error.mean() < 0.02 * want.square().mean().sqrt(), "the tolerance must stay below the signal"

    cpu = torch.ops.unicorn.int4_ffn(*args).double()
    assert (y.double() - cpu).square().mean() <= 1e-5 * cpu.square().mean()


@pytest.mark.parametrize("variant", ["matrix", "dot8_subgroup", "dot8_shared", "int_subgroup", "int_shared"])
@pytest.mark.parametrize("m", [1, 8, 71])
def test_every_variant(devices: Any, physical: Any, variant: str, m: int) -> None:
    from unicorn_backend.runtime.vulkan import variants

    missing = next(v for v in variants.VARIANTS if v.name == variant).missing(physical.features)
    if missing:
        pytest.skip(f"{physical.name}: {missing}")
    check(devices(variant), arguments(m, 128, 192, 128))


@pytest.mark.parametrize(
    ("m", "k", "f", "n", "act", "dtype", "norms", "own"),
    [
        (1, 96, 160, 64, "silu", torch.float32, True, True),
        (3, 50, 77, 34, "relu", torch.float16, False, True),  # nothing is a multiple of a tile
        (5, 33, 47, 13, "gelu", torch.float32, True, False),
        (13, 70, 90, 70, "silu", torch.float16, True, False),
        (131, 64, 65, 64, "gelu_tanh", torch.bfloat16, False, False),
    ],
)
def test_odd_shapes_types_and_activations(
    devices: Any, m: int, k: int, f: int, n: int, act: str, dtype: Any, norms: bool, own: bool
) -> None:
    check(devices(), arguments(m, k, f, n, act, dtype, norms, own))


@pytest.mark.parametrize("m", [1, 7, 67])
def test_a_layer_of_gemma3_1b(devices: Any, m: int) -> None:
    check(devices(), arguments(m, 1152, 6912, 1152))


def test_a_layer_of_gemma3_4b(devices: Any, physical: Any) -> None:
    check(devices(), arguments(1, 2560, 10240, 2560))


@pytest.mark.parametrize("placing", ["mapped", "staged"])
def test_where_weights_are_does_not_matter(devices: Any, placing: str) -> None:
    device, args = devices("", placing), arguments(3, 64, 96, 64)
    assert torch.equal(run(device, args), run(devices(), args))
    assert device.memory().shared == 0 and device.memory().used > 0


def test_long_prompts_go_in_pieces(devices: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from unicorn_backend.runtime.vulkan import kernels

    args = arguments(150, 64, 96, 64, dtype=torch.float32)
    whole = run(devices(), args)
    monkeypatch.setattr(kernels, "MAX_TOKENS", 64)
    device = devices("", "mapped")
    assert torch.equal(run(device, args), whole)


def test_not_finite_values_show_in_their_own_rows_only(devices: Any) -> None:
    args = arguments(4, 64, 96, 64, dtype=torch.float32)
    args[0][1, 5], args[0][2, 6] = float("nan"), float("inf")
    y = run(devices(), args)
    assert not y[1].isfinite().any() and not y[2].isfinite().any()
    assert y[0].isfinite().all() and y[3].isfinite().all()


def test_weights_changed_in_place_are_uploaded_again(devices: Any) -> None:
    args = arguments(2, 64, 96, 64)
    before = run(devices("", "mapped"), args)
    args[4][1].mul_(2)
    args[9 + 2].add_(1)  # the norm after it
    after = run(devices("", "mapped"), args)
    assert not torch.equal(before, after)
    check(devices("", "mapped"), args)


def test_what_cannot_run_says_why(devices: Any) -> None:
    args = list(arguments(2, 64, 96, 63, own=True))
    assert devices().region("int4_ffn", args) == "rows of 63 16-bit values do not end on a word"
    args = list(arguments(2, 64, 96, 64, own=True))
    args[-1] = args[-1].float()
    assert "the residual is torch.float32" in devices().region("int4_ffn", args)
