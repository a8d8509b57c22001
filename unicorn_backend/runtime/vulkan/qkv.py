"""`unicorn::int8_qkv` on a Vulkan device: three products of one input, all in one submit.

norm_quant   x -> RMS norm -> int8 activations     one workgroup per token
product x 3  -> fp32 sums, scale, bias             side by side, see `linear.py`
heads        -> q/k norm, rotation, rounding       one workgroup per head and token
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from unicorn_backend.runtime.vulkan.kernels import (
    TYPES,
    Kernels,
    Stage,
    Weights,
    item_bytes,
    norm_scale,
    submit_tokens,
    wrong_type,
    wrong_width,
)
from unicorn_backend.runtime.vulkan.linear import Target, product_grids, product_stages
from unicorn_backend.runtime.vulkan.logical import UPLOAD, LogicalDevice
from unicorn_backend.runtime.vulkan.variants import Variant

HEAD_THREADS = 128


@dataclass(frozen=True)
class Shape:
    """Everything that pipelines and buffers depend on."""

    k: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    pre_eps: float | None
    qk_eps: float | None
    bias: bool
    turned: int  # elements of a head that are rotated
    angles: torch.dtype  # of cos and sin
    interleaved: bool
    v_norm: bool

    @property
    def each(self) -> tuple[int, int, int]:
        """Heads of q, k and v."""
        return self.heads, self.kv_heads, self.kv_heads

    @property
    def width(self) -> int:
        return sum(self.each) * self.head_dim

    @property
    def max_tokens(self) -> int:
        return submit_tokens(self.k * self.width)

    @property
    def bytes(self) -> int:
        item = item_bytes(self.dtype)
        return self.max_tokens * (self.k * (item + 2) + self.width * (item + 4) + 8 * self.turned)

    def kernels(self, device: LogicalDevice, variant: Variant) -> QkvKernels:
        return QkvKernels(device, variant, self)


class Call(NamedTuple):
    """The arguments of one `int8_qkv`, by name (see `ops.py`)."""

    x: Tensor
    norm_w: Tensor | None
    norm_eps: float | None
    norm_offset: float
    wq: list[Tensor]
    wk: list[Tensor]
    wv: list[Tensor]
    bias: list[Tensor]
    q_norm_w: Tensor | None
    k_norm_w: Tensor | None
    qk_norm_eps: float | None
    qk_norm_offset: float
    cos: Tensor | None
    sin: Tensor | None
    heads: int
    kv_heads: int
    head_dim: int
    interleaved: bool
    v_norm: bool

    @property
    def lists(self) -> list[list[Tensor]]:
        return [self.wq, self.wk, self.wv]

    @property
    def small(self) -> list[Tensor]:
        return [*self.bias, *(w for w in (self.norm_w, self.q_norm_w, self.k_norm_w) if w is not None)]

    @property
    def shape(self) -> Shape:
        turned, angles = (0, torch.float32) if self.cos is None else (self.cos.shape[-1], self.cos.dtype)
        return Shape(
            self.x.shape[-1],
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.x.dtype,
            self.norm_eps,
            self.qk_norm_eps,
            bool(self.bias),
            turned,
            angles,
            self.interleaved,
            self.v_norm,
        )

    @property
    def inputs(self) -> list[Tensor]:
        angles = [t.expand(*self.x.shape[:-1], -1) for t in (self.cos, self.sin) if t is not None]
        return [self.x, *angles]

    def floats(self) -> list[Tensor]:
        """What the pre-norm, and the norms of q and k, multiply with; the biases one after the other."""
        norms = [norm_scale(w, self.qk_norm_offset, self.head_dim) for w in (self.q_norm_w, self.k_norm_w)]
        bias = torch.cat([b.detach().float() for b in self.bias]) if self.bias else torch.zeros(1)
        return [norm_scale(self.norm_w, self.norm_offset, self.x.shape[-1]), torch.cat(norms), bias]

    def refusal(self) -> str:
        if wrong := wrong_type(self.x):
            return wrong
        if self.cos is not None and self.sin is not None:
            if self.cos.dtype != self.sin.dtype or self.cos.dtype not in TYPES:
                return f"cos and sin are {self.cos.dtype} and {self.sin.dtype}"
        return wrong_width(self.head_dim, self.x.dtype, "heads")

    def result(self, rows: Tensor) -> tuple[Tensor, ...]:
        shape = self.shape
        parts = rows.view(*self.x.shape[:-1], -1, self.head_dim).split(shape.each, dim=2)
        return tuple(part.transpose(1, 2).clone(memory_format=torch.contiguous_format) for part in parts)


class QkvKernels(Kernels):
    shape: Shape

    def __init__(self, device: LogicalDevice, variant: Variant, shape: Shape) -> None:
        super().__init__(device, variant, shape, shape.width)
        tokens, angle = shape.max_tokens, shape.turned * item_bytes(shape.angles)
        sizes = [shape.k * item_bytes(shape.dtype)] + [angle, angle] * bool(angle)
        self.inputs = [self.buffer(tokens * size, UPLOAD) for size in sizes]
        self._a, self._a_scale = self.activations(shape.k)
        self._y = self.buffer(tokens * shape.width * 4)

    def stages(self, weights: Weights, bucket: int) -> list[Stage]:
        shape = self.shape
        pre, scales, bias = weights.floats
        stages = [self.quantize_input(shape.k, shape.pre_eps, pre)]
        bound = ((3, bias), (4, self._a), (5, self._a_scale), (6, self._y))
        first = 0
        for pieces, heads in zip(weights.lists, shape.each, strict=True):
            n = heads * shape.head_dim
            target = Target(TYPES[torch.float32], shape.bias, first, shape.width)
            found = product_stages(self, pieces, bound, (shape.k, n), target, bucket)
            stages += [s._replace(waits=s.waits and first == 0) for s in found]
            first += n
        cos, sin = self.inputs[1:] or (self._y, self._y)  # something must be bound
        return [*stages, Stage(self.heads(), ((0, self._y), (1, scales), (2, cos), (3, sin), (6, self.out)))]

    def grids(self, weights: Weights, bucket: int, tokens: int) -> list[tuple[int, int]]:
        products = [grid for pieces in weights.lists for grid in product_grids(self, pieces, bucket, tokens)]
        return [(self.rows_to_quantize(bucket, tokens), 1), *products, (sum(self.shape.each), tokens)]

    def heads(self) -> object:
        shape = self.shape
        more = (shape.heads, shape.kv_heads, shape.turned, TYPES[shape.angles], shape.interleaved, shape.v_norm)
        constants = [(5 + i, int(value)) for i, value in enumerate(more)]
        return self.row_pipeline("heads", shape.head_dim, shape.qk_eps, *constants, threads=HEAD_THREADS)
