"""What the ops on a Vulkan device have in common: weights, pipelines and buffers of one shape, and a call in pieces.

Up to 8 tokens products are GEMVs, compiled for 1, 2, 4 and 8 tokens; more go through GEMMs in pieces. Each piece is one
submit of a command buffer that is recorded once.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from unicorn_backend.layouts import GROUP, ROWS
from unicorn_backend.runtime.vulkan import variants
from unicorn_backend.runtime.vulkan.logical import (
    DEVICE,
    DOWNLOAD,
    UPLOAD,
    Buffer,
    Dispatch,
    LogicalDevice,
    Recorded,
)
from unicorn_backend.runtime.vulkan.variants import Variant

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BUCKETS = (1, 2, 4, 8)  # tokens that a GEMV is compiled for
BLOCK, LARGE_BLOCK = 64, 128  # tokens and rows of a GEMM's workgroup
MAX_TOKENS = 512  # per submit: what the buffers hold
# A submit must end long before a driver's watchdog (about 2 s on the slowest setting of amdgpu) sees it. The 780M
# computes about 2 T multiply-adds per second with dot products: 48 G take 24 ms.
MAX_MULTIPLY_ADDS = 48e9
# Threads that a GPU runs at once, about: below, more threads share the rows of a GEMV, and blocks of a GEMM are small.
# An H100 has 132 x 2048 and is not faster beyond 160,000; a 780M 12 x 2048.
PARALLEL = {"discrete": 160_000, "integrated": 16_000}
GEMV_THREADS = (128, 512)  # of a workgroup, least and most; each has 32 bytes of shared memory, and 1 KB for all
ROW_THREADS = 256
GEMM_THREADS = 256
GRIDS_BYTES = 1 << 10  # of the buffer of workgroup numbers: 85 stages
# A weight is cut between tiles whose scales and zero points (16 bytes a tile) lie on pages.
PIECE_TILES = 256


def submit_tokens(multiply_adds: int) -> int:
    """Tokens of one submit, whole blocks, where a token costs so many multiply-adds."""
    fit = int(min(MAX_MULTIPLY_ADDS // multiply_adds, MAX_TOKENS))
    return fit // LARGE_BLOCK * LARGE_BLOCK or BLOCK


def bucket_of(tokens: int) -> int:
    """The command buffer for so many tokens: of GEMVs, of GEMMs for one block of them (BLOCK), of others (0)."""
    return next((bucket for bucket in (*BUCKETS, BLOCK) if tokens <= bucket), 0)


def item_bytes(dtype: torch.dtype) -> int:
    return 4 if dtype == torch.float32 else 2


def norm_scale(w: Tensor | None, offset: float, width: int) -> Tensor:
    """fp32 [width]: what a norm multiplies with."""
    return torch.ones(width) if w is None else w.detach().float() + offset


def wrong_type(x: Tensor) -> str:
    """Why no shader takes activations of this dtype; "" if they do."""
    return "" if x.dtype in TYPES else f"activations are {x.dtype}"


def wrong_width(width: int, dtype: torch.dtype, what: str = "rows") -> str:
    """Why results of this width cannot be written, which is done by words; "" if they can."""
    odd = width % 2 and dtype != torch.float32
    return f"{what} of {width} 16-bit values do not end on a word" if odd else ""


class Shape(Protocol):
    """Everything that pipelines and buffers of an op depend on; hashable."""

    @property
    def max_tokens(self) -> int: ...

    @property
    def bytes(self) -> int:
        """Of the buffers, about."""

    def kernels(self, device: LogicalDevice, variant: Variant) -> Kernels: ...


class Call(Protocol):
    """The arguments of one call of an op."""

    @property
    def x(self) -> Tensor: ...

    @property
    def lists(self) -> list[list[Tensor]]:
        """Packed weights, which the device reads in place or gets a copy of."""

    @property
    def small(self) -> list[Tensor]:
        """What `floats` is made of."""

    @property
    def shape(self) -> Shape: ...

    @property
    def inputs(self) -> list[Tensor]:
        """What is copied to the device at each call, in the order of `Kernels.inputs`: one row per token."""

    def floats(self) -> list[Tensor]:
        """fp32 vectors that are copied to the device once."""

    def refusal(self) -> str:
        """Why this call cannot run on a device; "" if it can."""

    def result(self, rows: Tensor) -> Any:
        """The op's result, of the rows [tokens, width] that the device wrote."""


@dataclass(frozen=True)
class Piece:
    """Tiles of a packed weight in buffers of their own, one for each of its tensors."""

    first: int  # row
    rows: int  # padding included
    buffers: tuple[Buffer, ...]


class Weights:
    """One region's weights as the device reads them."""

    def __init__(self, device: LogicalDevice, call: Call, placing: str) -> None:
        """`placing`: "shared" (the CPU's own pages), "mapped" (a copy that both see), "staged" (device memory)."""
        self._device = device
        self.alive = [[w.detach() for w in weights] for weights in call.lists]  # shared pages stay as long as this
        self.lists = [_pieces(device, weights, placing) for weights in self.alive]
        self.floats = [_copied(device, values) for values in call.floats()]

    def free(self) -> None:
        for buffer in (*(b for pieces in self.lists for piece in pieces for b in piece.buffers), *self.floats):
            self._device.free(buffer)


def can_share(weights: Sequence[Tensor], alignment: int) -> bool:
    """True if these tensors have whole pages of anonymous memory to themselves."""
    arena = torch.classes.unicorn.Arena
    return bool(alignment) and all(
        arena.holds(w) and w.data_ptr() % alignment == 0 and alignment <= 4096 for w in weights
    )


def _pieces(device: LogicalDevice, weights: Sequence[Tensor], placing: str) -> list[Piece]:
    tiles, limit = weights[0].shape[0], device.physical.features.max_buffer_bytes
    step = tiles
    if weights[0].nbytes > limit:
        step = max(limit // (weights[0].nbytes // tiles) // PIECE_TILES, 1) * PIECE_TILES
    found = []
    for first in range(0, tiles, step):
        last = min(first + step, tiles)
        buffers = tuple(_upload(device, w[first:last], placing) for w in weights)
        found.append(Piece(first * ROWS, (last - first) * ROWS, buffers))
    return found


def _upload(device: LogicalDevice, weight: Tensor, placing: str) -> Buffer:
    if placing == "shared":
        return device.imported(weight.data_ptr(), weight.nbytes)
    weight = weight.contiguous()
    return device.staged(weight.data_ptr(), weight.nbytes) if placing == "staged" else _mapped(device, weight)


def _mapped(device: LogicalDevice, values: Tensor) -> Buffer:
    buffer = device.buffer(values.nbytes, UPLOAD)
    ctypes.memmove(buffer.address, values.data_ptr(), values.nbytes)
    return buffer


def _copied(device: LogicalDevice, values: Tensor) -> Buffer:
    return _mapped(device, values.detach().float().contiguous())


class Stage(NamedTuple):
    """One dispatch, whatever the number of workgroups."""

    pipeline: Any
    buffers: tuple[tuple[int, Buffer], ...]  # (binding, buffer)
    waits: bool = True  # for what the stage before it writes


class Product(NamedTuple):
    """A workgroup of a GEMV, which has all tokens of its bucket, or of a GEMM."""

    rows: int  # of each weight
    tokens: int
    threads: int

    def grid(self, n: int, tokens: int) -> tuple[int, int]:
        return -(-n // self.rows), 1 if self.tokens == 1 else -(-tokens // self.tokens)


class Kernels(ABC):
    """Pipelines and scratch buffers of one shape, shared by all layers that have it."""

    inputs: list[Buffer]
    _a: Buffer  # int8 activations, and their scales
    _a_scale: Buffer

    def __init__(
        self, device: LogicalDevice, variant: Variant, shape: Any, width: int, dtype: torch.dtype | None = None
    ) -> None:
        """`width`: values per token of the result, of `dtype`, else that of the shape."""
        self.device, self.variant, self.shape, self._width = device, variant, shape, width
        self._dtype = dtype or shape.dtype
        self._made: list[Buffer] = []
        self.out = self.buffer(shape.max_tokens * width * item_bytes(self._dtype), DOWNLOAD)
        self._grids = self.buffer(GRIDS_BYTES, UPLOAD)

    @abstractmethod
    def stages(self, weights: Weights, bucket: int) -> list[Stage]:
        """See `bucket_of`."""

    @abstractmethod
    def grids(self, weights: Weights, bucket: int, tokens: int) -> list[tuple[int, int]]:
        """Workgroups in x and y of each stage."""

    def product(self, n: int, bucket: int, weights: int = 1) -> Product:
        """How `n` rows of each of so many weights are multiplied."""
        many = PARALLEL.get(self.device.physical.kind, 0)
        if bucket in BUCKETS:
            groups, (threads, most), features = -(-n // (ROWS * weights)), GEMV_THREADS, self.device.physical.features
            most = min(most, features.threads, (features.shared_bytes - 1024) // 32)
            while 2 * threads <= most and groups * threads < many:
                threads *= 2
            return Product(ROWS * weights, 1, threads)
        large = Product(LARGE_BLOCK // weights, LARGE_BLOCK, GEMM_THREADS)
        across, down = large.grid(n, self.shape.max_tokens)
        if self._takes_large_blocks(bucket) and across * down * GEMM_THREADS >= many // 4:
            return large
        return Product(BLOCK, BLOCK, GEMM_THREADS)

    def _takes_large_blocks(self, bucket: int) -> bool:
        """Of tokens, in GEMMs with enough rows: buffers end with a whole block."""
        return self.variant.matrix and bucket != BLOCK and self.shape.max_tokens % LARGE_BLOCK == 0

    def rows_to_quantize(self, bucket: int, tokens: int) -> int:
        """GEMMs read whole blocks of tokens."""
        block = 1 if bucket in BUCKETS else LARGE_BLOCK if self._takes_large_blocks(bucket) else BLOCK
        return -(-tokens // block) * block

    def buffer(self, size: int, wanted: Sequence[int] = DEVICE) -> Buffer:
        self._made.append(self.device.buffer(size, wanted))
        return self._made[-1]

    def activations(self, k: int) -> tuple[Buffer, Buffer]:
        """int8 values and fp32 scales of `max_tokens` rows."""
        groups = self.shape.max_tokens * -(-k // GROUP)
        return self.buffer(groups * GROUP), self.buffer(groups * 4)

    def quantize_input(self, k: int, eps: float | None, scale: Buffer) -> Stage:
        """The first input's rows, normed with `scale` unless `eps` is None, into `_a` and `_a_scale`."""
        bound = ((0, self.inputs[0]), (1, scale), (6, self._a), (7, self._a_scale))
        return Stage(self.row_pipeline("norm_quant", k, eps), bound)

    def free(self) -> None:
        for buffer in self._made:
            self.device.free(buffer)

    def record(self, weights: Weights, bucket: int, clock: Any = None) -> Recorded:
        """The op for a bucket of tokens; GEMMs with grids that `set_grids` writes."""
        stages = self.stages(weights, bucket)
        grids: list[tuple[int, int] | int] = [12 * i for i in range(len(stages))]
        if bucket in BUCKETS:
            grids = [*self.grids(weights, bucket, bucket)]
        found = [Dispatch(s.pipeline, s.buffers, grid, s.waits) for s, grid in zip(stages, grids, strict=True)]
        return self.device.record(found, self._grids, clock)

    def set_grids(self, weights: Weights, bucket: int, tokens: int) -> None:
        """Before a command buffer with GEMMs runs: how many tokens there are."""
        numbers = [n for grid in self.grids(weights, bucket, tokens) for n in (*grid, 1)]
        ctypes.memmove(self._grids.address, (ctypes.c_uint32 * len(numbers))(*numbers), 4 * len(numbers))

    def start(self, weights: Weights, recorded: Callable[[int], Recorded], call: Call) -> Callable[[], Any]:
        """Submit a call, of a long one the last piece after running the others; what is returned waits for the result.

        `recorded(bucket)`: the command buffer for that many tokens. Both raise VulkanError and TimeoutError.
        """
        total = call.x.numel() // call.x.shape[-1]
        rows = [t.contiguous() for t in call.inputs]
        out = torch.empty((total, self._width), dtype=self._dtype)
        first, last = 0, 0  # the piece that is under way
        few = True

        def collect() -> None:
            if last > first:
                self.device.wait(spin=few)
                size = out.nbytes // total
                ctypes.memmove(out.data_ptr() + first * size, self.out.address, (last - first) * size)

        while last < total:
            collect()
            first = last
            last += min(total - first, BUCKETS[-1] if total <= BUCKETS[-1] else self.shape.max_tokens)
            bucket = bucket_of(last - first)
            few = bucket in BUCKETS
            for buffer, values in zip(self.inputs, rows, strict=True):
                size = values.nbytes // total
                ctypes.memmove(buffer.address, values.data_ptr() + first * size, (last - first) * size)
            if not few:
                self.set_grids(weights, bucket, last - first)
            self.device.submit(recorded(bucket))

        def finish() -> Any:
            collect()
            return call.result(out)

        return finish

    def row_pipeline(
        self,
        name: str,
        width: int,
        eps: float | None,
        *more: tuple[int, int],
        threads: int = ROW_THREADS,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """Of a shader with one workgroup per row; of `dtype`, else that of the shape."""
        norm = [(3, int(eps is not None)), (4, float(eps or 0.0))]
        constants = [(0, threads), (1, width), (2, TYPES[dtype or self.shape.dtype]), *norm, *more]
        return self.device.pipeline(variants.code(name), constants)

    def product_pipeline(
        self, name: str, which: str, bucket: int, product: Product, constants: Sequence[tuple[int, int]]
    ) -> Any:
        """A GEMV or a GEMM: `name` "linear_w8", `which` "gate_up" or ""."""
        variant = self.variant
        if bucket in BUCKETS:
            what = "_".join(filter(None, (which, variant.dot, variant.sums)))
            own = [(0, product.threads), (3, bucket), *constants]
            return self.device.pipeline(variants.code(f"{name}_gemv__{what}"), own, full_subgroups=variant.subgroup)
        shape = variants.matrix_shape(self.device.physical.features) if variant.matrix else None
        if shape is None:
            what = "_".join(filter(None, (which, variant.dot)))
            return self.device.pipeline(variants.code(f"{name}_gemm__{what}"), constants)
        what = "_".join(filter(None, (which, "large" if product.tokens == LARGE_BLOCK else "")))
        code = variants.code("__".join(filter(None, (f"{name}_gemm_matrix", what))))
        return self.device.pipeline(code, [*constants, *zip((9, 10, 11), shape, strict=True)], full_subgroups=True)
