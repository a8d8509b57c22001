"""The attention patterns: variations that are taken, and reasons for those that are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.graph.tracing import kinds, trace

B, T, HEADS, KV, D = 2, 5, 4, 2, 16
H = 48


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def rms(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    f = x.float()
    return (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + w.float())).type_as(x)


class Block(nn.Module):
    """Attention with switches for what the models of the field vary."""

    def __init__(
        self,
        *,
        qk_norm: str = "",
        rope: bool = True,
        fused: bool = False,
        eager: bool = False,
        softcap: float = 0.0,
        bias: bool = False,
        residual: bool = True,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.qk_norm, self.rope, self.eager, self.softcap = qk_norm, rope, eager, softcap
        self.residual, self.causal = residual, causal
        self.sizes = [HEADS * D, KV * D, KV * D]
        self.qkv = nn.Linear(H, sum(self.sizes), bias=bias) if fused else None
        self.p = nn.ModuleList(nn.Linear(H, size, bias=bias) for size in self.sizes)
        self.o = nn.Linear(HEADS * D, H, bias=bias)
        self.norms = nn.ParameterList(nn.Parameter(torch.randn(n)) for n in (H, D, D, H))

    def heads(self, x: torch.Tensor, w: torch.Tensor | None) -> torch.Tensor:
        x = x.view(*x.shape[:2], -1, D)
        if self.qk_norm == "before" and w is not None:
            x = rms(x, w)
        x = x.transpose(1, 2)
        return rms(x, w) if self.qk_norm == "after" and w is not None else x

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        normed = rms(x, self.norms[0])
        parts = self.qkv(normed).split(self.sizes, -1) if self.qkv is not None else [p(normed) for p in self.p]
        q, k, v = (self.heads(part, w) for part, w in zip(parts, (self.norms[1], self.norms[2], None), strict=True))
        if self.rope:
            c, s = cos.unsqueeze(1), sin.unsqueeze(1)
            q, k = q * c + rotate_half(q) * s, k * c + rotate_half(k) * s
        out = self.attend(q, k, v, mask).transpose(1, 2).reshape(*x.shape[:2], -1)
        out = rms(self.o(out), self.norms[3])
        return x + out if self.residual else out

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if not self.eager:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal, enable_gqa=True)
        k, v = (
            t[:, :, None].expand(-1, -1, HEADS // KV, -1, -1).reshape(t.shape[0], HEADS, t.shape[2], D) for t in (k, v)
        )
        logits = torch.matmul(q, k.transpose(2, 3)) * D**-0.5
        if self.softcap:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        logits = logits if mask is None else logits + mask
        return torch.matmul(torch.softmax(logits, -1, dtype=torch.float32).to(q.dtype), v)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(B, T, H), torch.randn(1, T, D), torch.randn(1, T, D)


def find(gm: torch.fx.GraphModule, op: Any) -> torch.fx.Node:
    return next(n for n in gm.graph.nodes if n.target is op)


@pytest.mark.parametrize("qk_norm", ["", "before", "after"])
@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_projections_and_core_are_taken(qk_norm: str, rope: bool, fused: bool) -> None:
    gm, match, _ = trace(Block(qk_norm=qk_norm, rope=rope, fused=fused), *inputs())[0]
    assert kinds(match) == ["attention", "qkv"], match.reasons
    qkv = find(gm, torch.ops.unicorn.int8_qkv.default)
    assert (qkv.args[8] is not None) == bool(qk_norm) and (qkv.args[12] is not None) == rope
    assert qkv.args[14:] == (HEADS, KV, D, False, False)
    assert not any(n.target is torch.ops.aten.linear.default for n in gm.graph.nodes)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_post_norm_and_residual_are_absorbed(bias: bool, residual: bool) -> None:
    gm, match, _ = trace(Block(bias=bias, residual=residual), *inputs())[0]
    assert kinds(match) == ["attention", "qkv"], match.reasons
    attention = find(gm, torch.ops.unicorn.int8_attention.default)
    assert attention.args[10] is not None and (attention.args[13] is not None) == residual
    assert (attention.args[8] is not None) == bias
    calls = {n.target for n in gm.graph.nodes if isinstance(n.target, torch._ops.OpOverload)}
    assert calls == {torch.ops.unicorn.int8_qkv.default, torch.ops.unicorn.int8_attention.default}


@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("masked", [False, True])
def test_eager_attention_with_softcap_and_mask(softcap: float, masked: bool) -> None:
    mask = torch.zeros(1, 1, T, T) if masked else None
    gm, match, _ = trace(Block(eager=True, softcap=softcap), *inputs(), mask)[0]
    assert kinds(match) == ["attention", "qkv"], match.reasons
    attention = find(gm, torch.ops.unicorn.int8_attention.default)
    assert attention.args[5] == pytest.approx(D**-0.5) and attention.args[6] == pytest.approx(softcap)
    assert (attention.args[3] is not None) == masked
    assert tuple(attention.args[1].meta["val"].shape)[1] == KV, "repeat_kv was not taken off"


@pytest.mark.parametrize("swapped", [False, True])
def test_a_query_scaled_per_token_stays_multiplied(swapped: bool) -> None:
    class Scaled(Block):
        def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
            scale = torch.log1p(torch.arange(q.shape[2]))[None, None, :, None]
            return super().attend(scale * q if swapped else q * scale, k, v, mask)

    gm, match, _ = trace(Scaled(), *inputs())[0]
    assert kinds(match) == ["attention", "qkv"], match.reasons
    query = find(gm, torch.ops.unicorn.int8_attention.default).args[0]
    assert query.target is torch.ops.aten.mul.Tensor, "the product is plain torch"
    assert "getitem" in {node.name.split("_")[0] for node in query.args}, "of the fused projection's query"


def test_causal_flag_is_kept() -> None:
    gm, _match, _ = trace(Block(causal=True), *inputs())[0]
    assert find(gm, torch.ops.unicorn.int8_attention.default).args[4] is True


def test_output_gate_has_a_reason() -> None:
    o = nn.Linear(HEADS * D, H)

    def gated(q: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        out = F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(B, T, -1)
        return o(out * gate)

    _, match, _ = trace(gated, torch.randn(B, HEADS, T, D), torch.randn(B, T, HEADS * D))[0]
    assert not match.regions and "not straight into one projection" in str(match.reasons[0])


def test_top_left_causal_with_more_keys_has_a_reason() -> None:
    o = nn.Linear(HEADS * D, H)

    def fn(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return o(F.scaled_dot_product_attention(q, k, k, is_causal=True).transpose(1, 2).reshape(B, T, -1))

    _, match, _ = trace(fn, torch.randn(B, HEADS, T, D), torch.randn(B, HEADS, T + 3, D))[0]
    assert not match.regions and "top left" in str(match.reasons[0])


def test_softmax_that_is_no_attention_is_no_candidate() -> None:
    _, match, _ = trace(lambda x: torch.softmax(x, -1), torch.randn(3, 7))[0]
    assert not match.regions and not match.reasons
