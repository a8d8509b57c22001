"""`unicorn::int4_ffn` on a Vulkan device: four dispatches in one pre-recorded command buffer, one submit per call.

norm_quant   x -> RMS norm -> int8 activations           one workgroup per token
gate_up      -> act(gate) * up -> int8 activations       rows / 32 (GEMV), or blocks of rows x tokens (GEMM)
down         -> fp32 sums
norm_add     -> post norm, residual, rounding            one workgroup per token
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from unicorn_backend.ops import ACTIVATIONS
from unicorn_backend.runtime.vulkan.kernels import (
    Kernels,
    Product,
    Stage,
    Weights,
    item_bytes,
    norm_scale,
    submit_tokens,
    wrong_type,
    wrong_width,
)
from unicorn_backend.runtime.vulkan.logical import UPLOAD, Buffer, LogicalDevice
from unicorn_backend.runtime.vulkan.variants import Variant


@dataclass(frozen=True)
class Shape:
    """Everything that pipelines and buffers depend on."""

    k: int
    f: int
    n: int
    act: str
    dtype: torch.dtype
    pre_eps: float | None
    post_eps: float | None
    residual: str  # "none", "own", "x": the same tensor as the input
    unrounded: bool = False

    @property
    def max_tokens(self) -> int:
        return submit_tokens(self.f * (2 * self.k + self.n))

    @property
    def bytes(self) -> int:
        item = item_bytes(self.dtype)
        return self.max_tokens * (self.k * (item + 2) + self.n * (2 * item + 4) + self.f * 2)

    def kernels(self, device: LogicalDevice, variant: Variant) -> FfnKernels:
        return FfnKernels(device, variant, self)


class Call(NamedTuple):
    """The arguments of one `int4_ffn`, by name (see `ops.py`)."""

    x: Tensor
    norm_w: Tensor | None
    norm_eps: float | None
    norm_offset: float
    wg: list[Tensor]
    wu: list[Tensor]
    wd: list[Tensor]
    bias: list[Tensor]
    act: str
    f: int
    n: int
    post_w: Tensor | None
    post_eps: float | None
    post_offset: float
    residual: Tensor | None
    unrounded: bool = False  # the result is fp32: `placed.Site.finish` adds the residual

    @property
    def lists(self) -> list[list[Tensor]]:
        return [self.wg, self.wu, self.wd]

    @property
    def small(self) -> list[Tensor]:
        return [w for w in (self.norm_w, self.post_w) if w is not None]

    @property
    def shape(self) -> Shape:
        kind = "none" if self.residual is None else "x" if self.residual is self.x else "own"
        return Shape(
            self.x.shape[-1], self.f, self.n, self.act, self.x.dtype, self.norm_eps, self.post_eps, kind, self.unrounded
        )

    @property
    def inputs(self) -> list[Tensor]:
        own = self.residual is not None and self.residual is not self.x
        return [self.x, self.residual] if own and self.residual is not None else [self.x]

    def floats(self) -> list[Tensor]:
        """What the two norms multiply with."""
        norms = ((self.norm_w, self.norm_offset, self.x.shape[-1]), (self.post_w, self.post_offset, self.n))
        return [norm_scale(w, offset, width) for w, offset, width in norms]

    def refusal(self) -> str:
        x, residual = self.x, self.residual
        if wrong := wrong_type(x):
            return wrong
        if residual is not None and (
            residual.dtype != x.dtype
            or residual.shape[-1] != self.n
            or residual.numel() != x.numel() // x.shape[-1] * self.n
        ):
            return f"the residual is {residual.dtype} {list(residual.shape)}"
        return wrong_width(self.n, x.dtype)

    def result(self, rows: Tensor) -> Tensor:
        return rows.view(*self.x.shape[:-1], self.n)


class FfnKernels(Kernels):
    shape: Shape

    def __init__(self, device: LogicalDevice, variant: Variant, shape: Shape) -> None:
        self._out = torch.float32 if shape.unrounded else shape.dtype
        super().__init__(device, variant, shape, shape.n, self._out)
        tokens, item = shape.max_tokens, item_bytes(shape.dtype)
        widths = (shape.k, shape.n) if shape.residual == "own" else (shape.k,)
        self.inputs = [self.buffer(tokens * width * item, UPLOAD) for width in widths]
        self._a, self._a_scale = self.activations(shape.k)
        self._p, self._p_scale = self.activations(shape.f)
        self._y = self.buffer(tokens * -(-shape.n // 16) * 16 * 4)

    def stages(self, weights: Weights, bucket: int) -> list[Stage]:
        shape, residual = self.shape, int(self.shape.residual != "none")
        (gate,), (up,), (down,) = weights.lists
        pre, post = weights.floats
        bound: list[tuple[Buffer, ...]] = [gate.buffers, up.buffers, down.buffers]
        (w0, s0), (w1, s1), (w2, s2) = bound
        a = ((4, self._a), (5, self._a_scale))
        p = ((4, self._p), (5, self._p_scale))
        return [
            self.quantize_input(shape.k, shape.pre_eps, pre),
            Stage(
                self.pipeline("gate_up", bucket),
                ((0, w0), (1, s0), (2, w1), (3, s1), *a, (6, self._p), (7, self._p_scale)),
            ),
            Stage(self.pipeline("down", bucket), ((0, w2), (1, s2), *p, (6, self._y))),
            Stage(
                self.row_pipeline("norm_add", shape.n, shape.post_eps, (5, residual), dtype=self._out),
                ((0, self._y), (1, post), (2, self.inputs[-1]), (6, self.out)),
            ),
        ]

    def grids(self, weights: Weights, bucket: int, tokens: int) -> list[tuple[int, int]]:
        products = [self.form(which, bucket).grid(n, tokens) for which, n in self._rows.items()]
        return [(self.rows_to_quantize(bucket, tokens), 1), *products, (tokens, 1)]

    @property
    def _rows(self) -> dict[str, int]:
        return {"gate_up": self.shape.f, "down": self.shape.n}

    def form(self, which: str, bucket: int) -> Product:
        return self.product(self._rows[which], bucket, 2 if which == "gate_up" else 1)

    def pipeline(self, which: str, bucket: int) -> object:
        shape = self.shape
        k = shape.k if which == "gate_up" else shape.f
        constants = [(1, k), (2, self._rows[which]), (4, ACTIVATIONS.index(shape.act))]
        return self.product_pipeline("ffn_w4g", which, bucket, self.form(which, bucket), constants)
