"""The feed-forward pattern: what it takes, and the reason for what it leaves."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.graph.tracing import kinds, trace

H, WIDTH = 32, 64


class Gated(nn.Module):
    """Gated feed-forward with switches for every variation the pattern knows."""

    def __init__(self, act: str = "gelu_tanh", bias: bool = False, fused: bool = False, swap: bool = False) -> None:
        super().__init__()
        self.act, self.fused, self.swap = act, fused, swap
        self.gate_up = nn.Linear(H, 2 * WIDTH, bias=bias) if fused else None
        self.a = nn.Linear(H, WIDTH, bias=bias)
        self.b = nn.Linear(H, WIDTH, bias=bias)
        self.c = nn.Linear(WIDTH, H, bias=bias)

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        acts = {
            "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
            "gelu": F.gelu,
            "silu": F.silu,
            "relu": F.relu,
        }
        return acts[self.act](x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, -1) if self.gate_up is not None else (self.a(x), self.b(x))
        gate = self.activate(gate)
        return self.c(up * gate if self.swap else gate * up)


@pytest.mark.parametrize("act", ["gelu_tanh", "gelu", "silu", "relu"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_gated_feed_forward_is_taken(act: str, fused: bool, swap: bool, bias: bool) -> None:
    module = Gated(act, bias, fused, swap)
    gm, match, _ = trace(module, torch.randn(2, 3, H))[0]
    assert kinds(match) == ["ffn"] and not match.reasons
    node = next(n for n in gm.graph.nodes if n.target is torch.ops.unicorn.int4_ffn.default)
    assert node.args[8] == act
    assert (node.args[9], node.args[10]) == (WIDTH, H)
    assert len(node.args[7]) == (3 if bias else 0)
    assert not any(n.target is torch.ops.aten.linear.default for n in gm.graph.nodes)


def cut(gate: torch.Tensor, sparsity: float) -> torch.Tensor:
    """As Gemma 3n does it."""
    distance = torch.distributions.Normal(0, 1).icdf(torch.tensor(sparsity)).to(gate.dtype)
    mean, std = gate.mean(-1, keepdim=True), torch.std(gate, dim=-1, keepdim=True, unbiased=False)
    return F.relu(gate - (mean + std * distance))


def test_a_cut_gate_makes_it_sparse() -> None:
    a, b, c = (nn.Parameter(torch.randn(rows, k)) for rows, k in ((WIDTH, H), (WIDTH, H), (H, WIDTH)))

    def block(x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.gelu(cut(F.linear(x, a), 0.95), approximate="tanh") * F.linear(x, b), c)

    x = torch.randn(2, 3, H)
    gm, match, _ = trace(block, x)[0]
    assert kinds(match) == ["ffn"] and not match.reasons
    targets = [n.target for n in gm.graph.nodes if n.op == "call_function"]
    assert torch.ops.aten.std.dim not in targets and torch.ops.aten.linear.default not in targets
    node = next(n for n in gm.graph.nodes if n.target is torch.ops.unicorn.sparse_ffn.default)
    assert node.args[-1] == pytest.approx(1.6448536, abs=1e-6)


@pytest.mark.parametrize("other", ["mean of something else", "a cutoff from the input", "half open", "alpha"])
def test_other_cuts_are_left(other: str) -> None:
    a, b, c = (nn.Parameter(torch.randn(rows, k)) for rows, k in ((WIDTH, H), (WIDTH, H), (H, WIDTH)))

    def block(x: torch.Tensor) -> torch.Tensor:
        gate, up = F.linear(x, a), F.linear(x, b)
        mean = (up if other == "mean of something else" else gate).mean(-1, keepdim=True)
        factor = x.amax() if other == "a cutoff from the input" else torch.tensor(1.5)
        threshold = mean + gate.std(-1, unbiased=other == "half open", keepdim=True) * factor
        above = torch.sub(gate, threshold, alpha=2) if other == "alpha" else gate - threshold
        return F.linear(F.silu(F.relu(above)) * up, c)

    gm, match, _ = trace(block, torch.randn(2, 3, H))[0]
    assert not match.regions
    assert torch.ops.unicorn.sparse_ffn.default not in {n.target for n in gm.graph.nodes}


def test_pre_norm_post_norm_and_residual_are_absorbed() -> None:
    module, first, second = Gated(), nn.Parameter(torch.randn(H)), nn.Parameter(torch.randn(H))

    def rms(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + w)

    def block(x: torch.Tensor) -> torch.Tensor:
        return x + rms(module(rms(x, first)), second)

    gm, match, _ = trace(block, torch.randn(2, 3, H))[0]
    calls = [n for n in gm.graph.nodes if n.op == "call_function"]
    assert kinds(match) == ["ffn"] and len(calls) == 1
    x = next(n for n in gm.graph.nodes if n.op == "placeholder" and n.meta["val"].dim() == 3)
    assert calls[0].args[0] is x and calls[0].args[-1] is x
    assert calls[0].args[2:4] == (1e-6, 1.0)


def test_norm_that_others_read_is_not_absorbed() -> None:
    module, w = Gated(), nn.Parameter(torch.randn(H))

    def block(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w
        return module(normed), normed

    gm, match, _ = trace(block, torch.randn(2, 3, H))[0]
    assert kinds(match) == ["ffn"]
    targets = [n.target for n in gm.graph.nodes if n.op == "call_function"]
    assert targets == [torch.ops.unicorn.rms_norm.default, torch.ops.unicorn.int4_ffn.default]


def ungated(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.linear(F.gelu(F.linear(x, a)), b)


def other_input(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.linear(F.silu(F.linear(x, a)) * F.linear(x + 1, a), b)


def product_read_twice(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    product = F.silu(F.linear(x, a)) * F.linear(x, a)
    return F.linear(product, b) + product.sum()


@pytest.mark.parametrize(
    ("fn", "text"),
    [
        (ungated, "not gated"),
        (other_input, "not a projection of the same input"),
        (product_read_twice, "one projection"),
    ],
)
def test_what_is_left_has_a_reason(fn: object, text: str) -> None:
    _, match, _ = trace(fn, torch.randn(2, 3, H), torch.randn(WIDTH, H), torch.randn(H, WIDTH))[0]  # type: ignore[arg-type]
    assert not match.regions
    assert [text in str(reason) for reason in match.reasons] == [True]


def test_activation_without_projection_is_no_candidate() -> None:
    _, match, _ = trace(lambda x: F.gelu(x) * x, torch.randn(3, H))[0]
    assert not match.regions and not match.reasons
