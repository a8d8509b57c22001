"""The plain-torch meaning of every `unicorn::` op: the oracle of the kernel tests.

Integer sums are exact (computed in fp64, which holds them), the float epilogue is fp64 or fp32 as
noted, so a kernel differs from this by its own fp32 rounding only. Slow; nothing but tests and
`Interpreter` below uses it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from unicorn_backend.layouts import GROUP, ROW_SCALE, dequantize, scheme_of, unpack

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
}


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """`a8g32`: float [..., K] -> int8 [..., G, 32] and fp32 scale [..., G], zero padded to G groups."""
    x = F.pad(x.float(), (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    amax = x.abs().amax(-1)
    # `127.0 / amax` is amax.reciprocal() * 127 in torch: two roundings.
    inverse = torch.where(amax > 0, torch.full_like(amax, 127.0) / amax, torch.zeros_like(amax))
    return torch.round(x * inverse[..., None]).to(torch.int8), amax / 127.0


def matmul(x: Tensor, w: list[Tensor], n: int) -> Tensor:
    """fp64 [..., n]: quantized weight times activations quantized per group; no bias."""
    k = x.shape[-1]
    if scheme_of(w) == "float":
        return x.to(w[0].dtype).double() @ w[0].double().T
    a, a_scale = quantize_activations(x)
    q, s, m = unpack(w, n, k)
    values, scale = q.double(), s.double().expand(n, a.shape[-2])  # [n, k], [n, G]
    values = F.pad(values, (0, -k % GROUP)).unflatten(-1, (-1, GROUP))  # [n, G, 32]
    sums = torch.einsum("...gk,ngk->...ng", a.double(), values)  # exact integers
    y = (sums * a_scale.double().unsqueeze(-2) * scale).sum(-1)
    return y if m is None else y + torch.einsum("...g,ng->...n", a.double().sum(-1) * a_scale.double(), m.double())


def rms_norm(x: Tensor, w: Tensor | None, eps: float, offset: float) -> Tensor:
    """See `ops.py`. Same shape and dtype as x."""
    return normed(x, w, eps, offset).to(x.dtype)


def linear(x: Tensor, w: list[Tensor], bias: Tensor | None, n: int) -> Tensor:
    """See `ops.py`. [..., K] -> [..., n]."""
    return _linear(x, w, bias, n).to(x.dtype)


def experts_linear(x: Tensor, experts: Tensor, w: list[Tensor], bias: Tensor | None, n: int) -> Tensor:
    """See `ops.py`. -> [M, k, n]."""
    count = w[0].shape[0] * 16 // n
    every = _linear(x, w, bias, count * n).unflatten(-1, (count, n))  # of all experts: [M, E, n] or [M, k, E, n]
    chosen = experts[..., None, None] if x.dim() == 3 else experts[..., None]
    shape = (*experts.shape, 1, n) if x.dim() == 3 else (*experts.shape, n)
    y: Tensor = every.gather(-2, chosen.expand(shape)).reshape(*experts.shape, n).to(x.dtype)
    return y


def embedding(ids: Tensor, w: list[Tensor], num_rows: int, k: int, dtype: torch.dtype) -> Tensor:
    """See `ops.py`. ids [...] -> [..., k]."""
    return F.embedding(ids, dequantize(w, num_rows, k)).to(dtype)


def int8_qkv(
    x: Tensor,
    norm_w: Tensor | None,
    norm_eps: float | None,
    norm_offset: float,
    wq: list[Tensor],
    wk: list[Tensor],
    wv: list[Tensor],
    bias: list[Tensor],
    q_norm_w: Tensor | None,
    k_norm_w: Tensor | None,
    qk_norm_eps: float | None,
    qk_norm_offset: float,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    kv_heads: int,
    head_dim: int,
    interleaved: bool,
    v_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.py`. -> q [B, H, T, D], k and v [B, Hkv, T, D]."""
    h = normed(x, norm_w, norm_eps, norm_offset)
    biases: list[Tensor | None] = [*bias] or [None] * 3
    out = []
    for weights, b, count, w in zip(
        (wq, wk, wv), biases, (heads, kv_heads, kv_heads), (q_norm_w, k_norm_w, None), strict=True
    ):
        y = _linear(_as_input(h, weights, x), weights, b, count * head_dim)
        out.append((y.unflatten(-1, (count, head_dim)).transpose(1, 2), w))
    q, k = (rotated(normed(y, w, qk_norm_eps, qk_norm_offset), cos, sin, interleaved) for y, w in out[:2])
    v = normed(out[2][0], None, qk_norm_eps if v_norm else None, 0.0)
    return q.to(x.dtype).contiguous(), k.to(x.dtype).contiguous(), v.to(x.dtype).contiguous()


def quantize_rows(x: Tensor) -> Tensor:
    """See `ops.py`. [.., D] -> int8 [.., D + 4]."""
    largest = x.float().abs().amax(-1, keepdim=True)
    tiny = largest < 1e-36
    finite = largest.isfinite()
    scale = torch.where(tiny, 0.0, largest / 127.0)
    inverse = torch.full_like(largest, 127.0) / largest  # 127.0 / largest would be a reciprocal and a product
    q = (x.float() * torch.where(tiny, 0.0, inverse)).round()
    q = torch.where(finite, q, 0.0).to(torch.int8)
    return torch.cat([q, scale.view(torch.int8)], -1)


def dequantize_rows(rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """See `ops.py`. int8 [.., D + 4] -> [.., D]."""
    return (rows[..., :-ROW_SCALE].float() * rows[..., -ROW_SCALE:].contiguous().view(torch.float32)).to(dtype)


def int8_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
    wo: list[Tensor],
    bo: Tensor | None,
    n: int,
    post_w: Tensor | None,
    post_eps: float | None,
    post_offset: float,
    residual: Tensor | None,
) -> Tensor:
    """See `ops.py`. -> [B, T, n]."""
    group = q.shape[1] // k.shape[1]
    k, v = (dequantize_rows(t) if t.dtype == torch.int8 else t for t in (k, v))
    keys, values = (t.double().repeat_interleave(group, 1) for t in (k, v))
    logits = q.double() @ keys.transpose(-1, -2) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    allowed = torch.ones(logits.shape[-2:], dtype=torch.bool)
    if causal:
        allowed = allowed.tril(logits.shape[-1] - logits.shape[-2])
    if mask is not None and mask.dtype == torch.bool:
        allowed = allowed & mask
    elif mask is not None:
        logits = logits + mask.double()
    weights = torch.nan_to_num(torch.softmax(logits.masked_fill(~allowed, -torch.inf), -1), nan=0.0)
    joined = (weights @ values).transpose(1, 2).flatten(2)
    return _finish(_linear(_as_input(joined, wo, q), wo, bo, n), post_w, post_eps, post_offset, residual, q.dtype)


def int4_ffn(
    x: Tensor,
    norm_w: Tensor | None,
    norm_eps: float | None,
    norm_offset: float,
    wg: list[Tensor],
    wu: list[Tensor],
    wd: list[Tensor],
    bias: list[Tensor],
    act: str,
    f: int,
    n: int,
    post_w: Tensor | None,
    post_eps: float | None,
    post_offset: float,
    residual: Tensor | None,
    cutoff: float | None = None,
) -> Tensor:
    """See `ops.py`; with a cutoff it is sparse_ffn. [..., K] -> [..., n]."""
    h = normed(x, norm_w, norm_eps, norm_offset)
    biases: list[Tensor | None] = [*bias] or [None] * 3
    bg, bu, bd = biases
    gate, up = (_linear(_as_input(h, w, x), w, b, f) for w, b in ((wg, bg), (wu, bu)))
    if cutoff is not None:
        gate = (gate - (gate.mean(-1, True) + cutoff * gate.std(-1, correction=0, keepdim=True))).relu()
    product = ACTIVATIONS[act](gate) * up
    return _finish(_linear(_as_input(product, wd, x), wd, bd, n), post_w, post_eps, post_offset, residual, x.dtype)


def sparse_ffn(*args: Any) -> Tensor:
    """See `ops.py`. [..., K] -> [..., n]."""
    return int4_ffn(*args)


def band_mask(queries: int, keys: int, lower: int, upper: int) -> Tensor:
    """See `ops.py`. bool [1, 1, queries, keys]."""
    difference = torch.arange(keys)[None, :] - torch.arange(queries)[:, None]
    return ((difference >= lower) & (difference <= upper))[None, None]


def rotary_tables(positions: Tensor, inv_freq: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See `ops.py`. int64 [B, T] and fp32 [D / 2] -> cos and sin [B, T, D]; in fp32, as transformers computes them."""
    half = positions[..., None].float() * inv_freq
    angles = torch.cat((half, half), dim=-1)
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


REGIONS = (linear, experts_linear, embedding, rms_norm, int8_qkv, int8_attention, int4_ffn, sparse_ffn)
FUNCTIONS: dict[str, Callable[..., Any]] = {f.__name__: f for f in (*REGIONS, band_mask, rotary_tables)}


class Interpreter(fx.Interpreter):
    """Runs a compiled graph with every `unicorn::` op replaced by its reference."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(target, torch._ops.OpOverload) and target.namespace == "unicorn":
            return FUNCTIONS[target._schema.name.split("::")[1]](*args, **kwargs)
        return super().call_function(target, args, kwargs)


def _as_input(h: Tensor, w: list[Tensor], x: Tensor) -> Tensor:
    """What a projection reads: unrounded where it is quantized next, else in the dtype of x."""
    return h.float() if scheme_of(w) != "float" else h.to(x.dtype)


def _linear(x: Tensor, w: list[Tensor], bias: Tensor | None, n: int) -> Tensor:
    y = matmul(x, w, n)
    return y if bias is None else y + bias.double()


def normed(x: Tensor, w: Tensor | None, eps: float | None, offset: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """x under an RMS norm, computed in `dtype`; x itself where eps is None."""
    if eps is None:
        return x
    d = x.to(dtype)
    d = d * torch.rsqrt(d.pow(2).mean(-1, keepdim=True) + eps)
    return d if w is None else d * (w.to(dtype) + offset)


def rotated(
    x: Tensor, cos: Tensor | None, sin: Tensor | None, interleaved: bool = False, dtype: torch.dtype = torch.float64
) -> Tensor:
    """x [B, heads, T, D] under rotary embedding, computed in `dtype`; cos, sin [B or 1, T, R], or None: x itself."""
    if cos is None or sin is None:
        return x
    width = cos.shape[-1]
    turned, rest = x[..., :width].to(dtype), x[..., width:].to(dtype)
    swap = swapped(turned, interleaved)
    return torch.cat((turned * cos.to(dtype).unsqueeze(1) + swap * sin.to(dtype).unsqueeze(1), rest), -1)


def swapped(x: Tensor, interleaved: bool) -> Tensor:
    """The other element of each rotated pair, the first of a pair negative."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def _finish(
    y: Tensor, w: Tensor | None, eps: float | None, offset: float, residual: Tensor | None, dtype: torch.dtype
) -> Tensor:
    y = normed(y, w, eps, offset)
    return (y if residual is None else y + residual.double()).to(dtype)
