"""`int8_qkv` and `int8_attention` with their integer part on an engine: what the host does before and after.

The CPU's kernels quantize activations in groups of 32 and attend in fp32; here activations are int8 per token and
attention is integers, so results differ within quantization error (`tests/npu/test_regions.py` measures how much).
Queries, keys and values are quantized per call:

- q: int8 per row. k: the mean over the keys is taken off first (softmax does not see it, and it is where the
  outlier channels of k sit), then int8 with one step per head, finer by a power of two per block of keys.
- v: int8 per channel of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unicorn_backend.layouts import W8_ZERO, unpack_w8
from unicorn_backend.reference import normed, rotated
from unicorn_backend.runtime.npu import wanted
from unicorn_backend.runtime.npu.arithmetic import Keys, Rows
from unicorn_backend.runtime.npu.designs import MAX_KEYS, Attention, IllegalDesign
from unicorn_backend.runtime.npu.engine import Engine, Weights
from unicorn_backend.runtime.overlap import ranges

NOT_FINITE = "a value is not finite"
MASK_FLOOR = -1e30  # a mask value at or below it means "no weight", as in the CPU's kernels
NOISE = 0.25  # nats of a logit's standard deviation: above it a result is off by more than some 5 %
FINER = 7  # most that a block's step is halved
LOGIT_UNIT = 256 * math.log2(math.e)  # Q8, log2


@dataclass
class Projection:
    """Packed `w8c` weights of one or several projections of the same input, as one product."""

    weights: Weights
    scale: Tensor  # fp32 [N]

    @staticmethod
    def of(engine: Engine, target: str, lists: Sequence[list[Tensor]], sizes: Sequence[int], k: int) -> Projection:
        """`lists`: w8c weights [n, k] with the `sizes` n. Raises Unavailable, IllegalDesign."""
        unpacked = [unpack_w8(w, n, k) for w, n in zip(lists, sizes, strict=True)]
        values = torch.cat([q for q, _, _ in unpacked]).to(torch.int16).sub_(W8_ZERO).to(torch.int8)
        design = wanted.projection(target, k, sum(sizes))
        return Projection(engine.weights(design, values.numpy()), torch.cat([s for _, s, _ in unpacked]))

    def __call__(self, engine: Engine, x: Tensor) -> Tensor:
        """fp32 [M, K] -> fp32 [M, N]. x finite."""
        amax = x.abs().amax(-1, keepdim=True).clamp_min(1e-30)
        a = torch.round(x * (127.0 / amax)).to(torch.int8)
        sums = torch.from_numpy(engine.gemm(self.weights, a.numpy()))
        return sums.float() * (amax / 127.0) * self.scale


class QkvRegion:
    """`unicorn::int8_qkv` of one set of weights."""

    def __init__(self, engine: Engine, target: str, arguments: Sequence[Any]) -> None:
        x, wq, wk, wv = arguments[0], *arguments[4:7]
        heads, kv_heads, dim = arguments[14:17]
        self._engine = engine
        self._sizes = [heads * dim, kv_heads * dim, kv_heads * dim]
        self._projection = Projection.of(engine, target, (wq, wk, wv), self._sizes, x.shape[-1])

    def run(self, arguments: Sequence[Any]) -> tuple[Tensor, ...] | str:
        """The op's result, or why these values are the CPU's."""
        x, norm_w, norm_eps, norm_offset = arguments[:4]
        bias, q_norm_w, k_norm_w, eps, offset, cos, sin, _, _, dim, interleaved, v_norm = arguments[7:19]
        h = normed(x.float(), norm_w, norm_eps, norm_offset, torch.float32).reshape(-1, x.shape[-1])
        if not torch.isfinite(h).all():
            return NOT_FINITE
        y = self._projection(self._engine, h).view(*x.shape[:2], -1)
        out = []
        for i, part in enumerate(y.split(self._sizes, -1)):
            biased = part + bias[i].float() if bias else part
            states = biased.unflatten(-1, (-1, dim)).transpose(1, 2)
            if i < 2:
                states = normed(states, (q_norm_w, k_norm_w)[i], eps, offset, torch.float32)
                states = rotated(states, cos, sin, interleaved, torch.float32)
            elif v_norm:
                states = normed(states, None, eps, 0.0, torch.float32)
            out.append(states.to(x.dtype).contiguous())
        return tuple(out)


class AttentionRegion:
    """`unicorn::int8_attention` of one output projection."""

    def __init__(self, engine: Engine, target: str, arguments: Sequence[Any]) -> None:
        q, wo, n = arguments[0], arguments[7], arguments[9]
        self._engine, self._n = engine, n
        self._design = wanted.attention(target, q.shape[-1])
        engine.prepare(self._design)
        self._projection = Projection.of(engine, target, (wo,), (n,), q.shape[1] * q.shape[3])

    def run(self, arguments: Sequence[Any]) -> Tensor | str:
        """The op's result, or why these values are the CPU's."""
        found = self.parts(arguments, 1)
        return found if isinstance(found, str) else next(found)[1]

    def parts(self, arguments: Sequence[Any], count: int) -> Iterator[tuple[slice, Tensor]] | str:
        """The same for `count` ranges of tokens; everything is quantized once, so the bits do not depend on them."""
        q, k, v, mask, causal, scale = arguments[:6]
        k, v = (torch.ops.unicorn.dequantize_rows(t, q.dtype) if t.dtype == torch.int8 else t for t in (k, v))
        spans = key_spans(mask, causal, q.shape[0], q.shape[2], k.shape[2])
        if spans is None:
            return "its mask adds to logits, or lets a query see keys that are no range"
        if not all(bool(torch.isfinite(t).all()) for t in (q, k, v)):
            return NOT_FINITE
        heads = quantized_heads(self._design, q, k, v, spans, scale)
        if heads is None:
            return "int8 queries and keys would be too coarse for logits as large as these"
        return ((tokens, self._rows(arguments, heads, tokens)) for tokens in ranges(q.shape[2], count))

    def _rows(self, arguments: Sequence[Any], heads: list[Head], tokens: slice) -> Tensor:
        q, residual = arguments[0], arguments[13]
        bo, _, post_w, post_eps, post_offset = arguments[8:13]
        joined = attend(self._engine, self._design, q.shape, heads, tokens)
        y = self._projection(self._engine, joined.flatten(0, 1)).view(*joined.shape[:2], self._n)
        y = normed(y if bo is None else y + bo.float(), post_w, post_eps, post_offset, torch.float32)
        return (y if residual is None else y + residual[:, tokens].float()).to(q.dtype)


def refusal(op: str, constants: dict[str, Any], schemes: Sequence[str]) -> str:
    """Why a region's kind cannot go to the NPU, from what the graph fixes; "" if it can."""
    if any(scheme != "w8c" for scheme in schemes):
        return f"its weights are {', '.join(dict.fromkeys(schemes))}; the NPU's kernels take int8 per channel (w8c)"
    if op == "int8_attention" and constants.get("softcap"):
        return "the NPU's kernel has no softcap"
    return ""


def key_spans(mask: Tensor | None, causal: bool, b: int, t: int, s: int) -> NDArray[np.int64] | None:
    """[B, T, 2]: first and one past the last key of each query, or None if its keys are no range for all heads."""
    allowed = torch.ones(b, t, s, dtype=torch.bool)
    if mask is not None:
        shaped = (
            mask.expand(b, *mask.shape[-3:]) if mask.dim() == 4 else mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
        )
        if shaped.shape[1] != 1:
            return None
        seen = shaped[:, 0] if mask.dtype == torch.bool else shaped[:, 0] > MASK_FLOOR
        if mask.dtype != torch.bool and (bool((shaped[:, 0][seen] != 0).any()) or not bool(seen.any(-1).all())):
            return None  # it adds something, or a row has nothing but the lowest value, which means equal weights
        allowed &= seen
    if causal:
        allowed &= torch.ones(t, s, dtype=torch.bool).tril(s - t)
    count = allowed.sum(-1)
    first = allowed.to(torch.uint8).argmax(-1)
    last = torch.where(count > 0, s - allowed.flip(-1).to(torch.uint8).argmax(-1), 0)
    first = torch.where(count > 0, first, 0)
    if not torch.equal(last - first, count):
        return None
    return torch.stack((first, last), -1).numpy()


@dataclass
class Head:
    """What one K/V head of one sequence computes with: query rows are [T, H / Hkv], flat."""

    batch: int
    first: int  # of its query heads
    group: int  # how many these are
    rows: Rows
    keys: Keys
    v_step: Tensor  # fp32 [D]


def quantized_heads(
    design: Attention, q: Tensor, k: Tensor, v: Tensor, spans: NDArray[np.int64], scale: float
) -> list[Head] | None:
    """q [B, H, T, D], k and v [B, Hkv, S, D]; None where int8 would leave too little of the logits (`NOISE`)."""
    if scale < 0:
        q, scale = -q, -scale
    b, h, t, d = q.shape
    hkv, group = k.shape[1], h // k.shape[1]
    heads = []
    for i in range(b):
        seen = spans[i][spans[i, :, 0] < spans[i, :, 1]]
        if not len(seen):
            continue
        low = int(seen[:, 0].min())  # keys that no query sees do not widen the scales
        high = int(seen[:, 1].max())
        for j in range(hkv):
            query = q[i, j * group : (j + 1) * group].float().transpose(0, 1).reshape(t * group, d)
            if logit_noise(query, k[i, j, low:high].float(), scale) > NOISE:
                return None
            keys, k_step, v_step = quantize_keys(design, k[i, j, low:high].float(), v[i, j, low:high].float())
            per_row = np.repeat(spans[i] - low, group, 0).clip(0, high - low)
            rows = quantize_queries(query, k_step * scale, per_row, FINER)
            heads.append(Head(i, j * group, group, rows, keys, v_step))
    return heads


def attend(engine: Engine, design: Attention, shape: Sequence[int], heads: list[Head], tokens: slice) -> Tensor:
    """`tokens` of an attention whose q has `shape` [B, H, T, D] -> fp32 [B, t, H * D]."""
    b, h, _, d = shape
    count = tokens.stop - tokens.start
    out = torch.zeros(b, count, h, d)
    for head in heads:
        rows = head.rows.part(slice(tokens.start * head.group, tokens.stop * head.group))
        state = engine.attend(design, rows, head.keys)
        values = torch.from_numpy(state.o / np.maximum(state.l, 1)[:, None]).float() * head.v_step
        out[head.batch, :, head.first : head.first + head.group] = values.view(count, head.group, d)
    return out.flatten(2)


def logit_noise(q: Tensor, k: Tensor, scale: float) -> float:
    """Standard deviation that int8 steps add to the logits of the worst row, in nats. q [R, D], k [S, D] fp32."""
    k = k - k.mean(0)
    steps = torch.stack((k.abs().max() * q.norm(dim=1).max(), q.abs().max() * k.norm(dim=1).max())) / 127.0
    return float(scale * steps.double().norm() / math.sqrt(12.0))


def quantize_queries(q: Tensor, k_scale: float, spans: NDArray[np.int64], finer: int) -> Rows:
    """fp32 [R, D] -> int8 rows. `k_scale`: step of k times the softmax scale.

    mult is int16 with one shift per call: the largest row gets 15 bits, a row 2^n smaller n bits fewer, and its
    logits are smaller in the same measure. `finer` bits of the shift stay free for the blocks of keys.
    """
    amax = q.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    values = torch.round(q * (127.0 / amax)).to(torch.int8).numpy()
    unit = (amax[:, 0].double() / 127.0).numpy() * k_scale * LOGIT_UNIT
    most = float(unit.max())
    shift = min(max(14 - math.ceil(math.log2(most)), 0), 55 - finer) if most > 0 else 0
    mult = np.clip(np.rint(unit * 2.0**shift), 0, 32767).astype(np.int16)
    return Rows(values, mult, spans[:, 0].astype(np.int32), spans[:, 1].astype(np.int32), shift)


def quantize_keys(design: Attention, k: Tensor, v: Tensor) -> tuple[Keys, float, Tensor]:
    """fp32 [S, D] each -> int8 keys padded to whole launches, step of k, steps of v [D]."""
    if len(k) > MAX_KEYS:
        raise IllegalDesign(f"keys: got {len(k)}, legal are up to {MAX_KEYS}")
    padded = -(-len(k) // design.key_range) * design.key_range
    centred = torch.zeros(padded, k.shape[1])
    centred[: len(k)] = k - k.mean(0)
    blocks = centred.view(-1, design.keys, k.shape[1])
    per_block = blocks.abs().amax((1, 2))
    most = float(per_block.max().clamp_min(1e-30))
    finer = torch.floor(torch.log2(most / per_block.clamp_min(most * 2.0**-FINER))).clamp(0, FINER)
    steps = (127.0 / most) * torch.exp2(finer)
    key = torch.round(blocks * steps[:, None, None]).clamp(-127, 127).to(torch.int8).view(padded, -1)
    v_most = v.abs().amax(0).clamp_min(1e-30)
    value = torch.zeros(padded, v.shape[1], dtype=torch.int8)
    value[: len(v)] = torch.round(v * (127.0 / v_most)).to(torch.int8)
    return Keys(key.numpy(), value.numpy(), finer.to(torch.int32).numpy(), design.keys), most / 127.0, v_most / 127.0
