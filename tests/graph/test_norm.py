"""RMS norm in every spelling becomes one op, and what is no RMS norm stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.graph.tracing import trace

D = 24
EPS = 1e-5
Norm = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def gemma(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    f = x.float()
    return (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + EPS) * (1.0 + w.float())).type_as(x)


def llama(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    f = x.to(torch.float32)
    f = f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + EPS)
    return w * f.to(x.dtype)


def squared_by_product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    f = x.float()
    return (torch.rsqrt((f * f).mean(-1, keepdim=True) + EPS) * f * w).to(x.dtype)


def power_of_minus_half(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    f = x.float()
    return (f * torch.pow(f.pow(2).mean(dim=-1, keepdim=True) + EPS, -0.5) * w).to(x.dtype)


@pytest.mark.parametrize(
    ("norm", "offset"), [(gemma, 1.0), (llama, 0.0), (squared_by_product, 0.0), (power_of_minus_half, 0.0)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rms_norm_is_one_op(norm: Norm, offset: float, dtype: torch.dtype) -> None:
    gm, _, _ = trace(norm, torch.randn(2, 3, D, dtype=dtype), torch.nn.Parameter(torch.randn(D, dtype=dtype)))[0]
    calls = [n for n in gm.graph.nodes if n.op == "call_function"]
    assert [n.target for n in calls] == [torch.ops.unicorn.rms_norm.default]
    assert calls[0].args[2:] == (EPS, offset)


def test_norm_without_weight() -> None:
    def norm(x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)

    gm, _, _ = trace(norm, torch.randn(2, D))[0]
    call = next(n for n in gm.graph.nodes if n.op == "call_function")
    assert call.target is torch.ops.unicorn.rms_norm.default and call.args[1] is None


def layer_norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    c = x - x.mean(-1, keepdim=True)
    return c * torch.rsqrt(c.pow(2).mean(-1, keepdim=True) + EPS) * w + x


def other_axis(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + EPS) * w


def other_source(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + EPS) * w


@pytest.mark.parametrize("fn", [other_axis, other_source])
def test_what_is_no_rms_norm_stays(fn: Norm) -> None:
    gm, _, _ = trace(fn, torch.randn(3, D), torch.nn.Parameter(torch.randn(D)))[0]
    assert not any(n.target is torch.ops.unicorn.rms_norm.default for n in gm.graph.nodes)


def test_layer_norm_keeps_its_mean() -> None:
    gm, _, _inputs = trace(layer_norm, torch.randn(3, D), torch.nn.Parameter(torch.randn(D)))[0]
    assert any(n.target is torch.ops.aten.sub.Tensor for n in gm.graph.nodes)
