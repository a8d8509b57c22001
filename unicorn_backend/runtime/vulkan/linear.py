"""`unicorn::linear` on a Vulkan device, the tied head among them: weights of one byte, `w8c` and `w8a`.

    norm_quant   x -> int8 activations            one workgroup per token
    product      -> sums, scale, bias, rounding   rows / 16 (GEMV) or rows / 64 x tokens / 64 (GEMM)

A weight that is larger than a buffer of the device may be has a product for each of its pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from unicorn_backend.runtime.vulkan.kernels import (
    BLOCK,
    BUCKETS,
    TYPES,
    Kernels,
    Piece,
    Stage,
    Weights,
    item_bytes,
    submit_tokens,
    wrong_type,
    wrong_width,
)
from unicorn_backend.runtime.vulkan.logical import UPLOAD, Buffer, LogicalDevice
from unicorn_backend.runtime.vulkan.variants import Variant

SCHEMES = ("w8c", "w8a")
OUT_BYTES = 64 << 20  # of results per submit: a prompt's logits come in pieces, and no more is allocated


@dataclass(frozen=True)
class Shape:
    """Everything that pipelines and buffers depend on."""

    k: int
    n: int
    dtype: torch.dtype
    bias: bool
    many: bool  # tokens: a head's buffers for one are small

    @property
    def max_tokens(self) -> int:
        if not self.many:
            return BUCKETS[-1]
        fit = OUT_BYTES // (self.n * item_bytes(self.dtype)) // BLOCK * BLOCK
        return min(submit_tokens(self.n * self.k), max(fit, BLOCK))

    @property
    def bytes(self) -> int:
        item = item_bytes(self.dtype)
        return self.max_tokens * (self.k * (item + 2) + self.n * item)

    def kernels(self, device: LogicalDevice, variant: Variant) -> LinearKernels:
        return LinearKernels(device, variant, self)


class Call(NamedTuple):
    """The arguments of one `linear`, by name (see `ops.py`)."""

    x: Tensor
    w: list[Tensor]
    bias: Tensor | None
    n: int

    @property
    def lists(self) -> list[list[Tensor]]:
        return [self.w]

    @property
    def small(self) -> list[Tensor]:
        return [] if self.bias is None else [self.bias]

    @property
    def shape(self) -> Shape:
        k = self.x.shape[-1]
        many = self.x.numel() > k * BUCKETS[-1]
        return Shape(k, self.n, self.x.dtype, self.bias is not None, many)

    @property
    def inputs(self) -> list[Tensor]:
        return [self.x]

    def floats(self) -> list[Tensor]:
        """The bias; `norm_quant` binds its norm's weight without reading it."""
        return [torch.zeros(1) if self.bias is None else self.bias]

    def refusal(self) -> str:
        return wrong_type(self.x) or wrong_width(self.n, self.x.dtype)

    def result(self, rows: Tensor) -> Tensor:
        return rows.view(*self.x.shape[:-1], self.n)


class LinearKernels(Kernels):
    shape: Shape

    def __init__(self, device: LogicalDevice, variant: Variant, shape: Shape) -> None:
        super().__init__(device, variant, shape, shape.n)
        self.inputs = [self.buffer(shape.max_tokens * shape.k * item_bytes(shape.dtype), UPLOAD)]
        self._a, self._a_scale = self.activations(shape.k)

    def stages(self, weights: Weights, bucket: int) -> list[Stage]:
        (bias,) = weights.floats
        (pieces,) = weights.lists
        shape, bound = self.shape, ((3, bias), (4, self._a), (5, self._a_scale), (6, self.out))
        target = Target(TYPES[shape.dtype], shape.bias, 0, shape.n)
        quantize = self.quantize_input(shape.k, None, bias)
        return [quantize, *product_stages(self, pieces, bound, (shape.k, shape.n), target, bucket)]

    def grids(self, weights: Weights, bucket: int, tokens: int) -> list[tuple[int, int]]:
        (pieces,) = weights.lists
        return [(self.rows_to_quantize(bucket, tokens), 1), *product_grids(self, pieces, bucket, tokens)]


class Target(NamedTuple):
    """Where a product's rows go: `first`, ... of `total` values per token."""

    type: int  # of TYPES
    bias: bool
    first: int
    total: int


def product_stages(
    kernels: Kernels,
    pieces: Sequence[Piece],
    bound: tuple[tuple[int, Buffer], ...],
    size: tuple[int, int],
    target: Target,
    bucket: int,
) -> list[Stage]:
    """A stage for each piece of a `w8c` or `w8a` weight of `size` (K, N). `bound`: buffers 3 to 6."""
    k, n = size
    stages = []
    for number, piece in enumerate(pieces):
        w, s, *z = piece.buffers
        constants = [
            (1, k),
            (2, min(piece.rows, n - piece.first)),
            (4, target.type),
            (5, len(z)),
            (6, int(target.bias)),
            (7, target.first + piece.first),
            (8, target.total),
        ]
        pipeline = kernels.product_pipeline("linear_w8", "", bucket, kernels.product(piece.rows, bucket), constants)
        stages.append(Stage(pipeline, ((0, w), (1, s), (2, z[0] if z else s), *bound), number == 0))
    return stages


def product_grids(kernels: Kernels, pieces: Sequence[Piece], bucket: int, tokens: int) -> list[tuple[int, int]]:
    """Workgroups for each piece."""
    return [kernels.product(piece.rows, bucket).grid(piece.rows, tokens) for piece in pieces]
