"""`unicorn::int4_ffn` on a Vulkan device: four dispatches in one pre-recorded command buffer, one submit per call.

    norm_quant   x -> RMS norm -> int8 activations           one workgroup per token
    gate_up      -> act(gate) * up -> int8 activations       rows / 32 (GEMV) or rows / 64 x tokens / 64 (GEMM)
    down         -> fp32 sums
    norm_add     -> post norm, residual, rounding            one workgroup per token

Up to 8 tokens the two in the middle are GEMVs, compiled for 1, 2, 4 and 8 tokens; more go through the GEMM in pieces.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unicorn_backend.ops import ACTIVATIONS
from unicorn_backend.runtime.vulkan import variants
from unicorn_backend.runtime.vulkan.logical import DEVICE, DOWNLOAD, UPLOAD, Buffer, Dispatch, LogicalDevice, Recorded
from unicorn_backend.runtime.vulkan.variants import Variant

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BUCKETS = (1, 2, 4, 8)  # tokens that a GEMV is compiled for
BLOCK = 64  # tokens and rows of a GEMM's workgroup
MAX_TOKENS = 512  # per submit: what the buffers hold
# A submit must end long before a driver's watchdog (about 2 s on the slowest setting of amdgpu) sees it. The 780M
# computes about 2 T multiply-adds per second with dot products: 24 G take 12 ms.
MAX_MULTIPLY_ADDS = 24e9
ROW_THREADS, GATE_UP_THREADS, DOWN_THREADS = 256, 128, 256


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

    @property
    def item(self) -> int:
        return 4 if self.dtype == torch.float32 else 2

    @property
    def max_tokens(self) -> int:
        per_token = self.f * (2 * self.k + self.n)
        return int(min(max(MAX_MULTIPLY_ADDS // per_token // BLOCK, 1), MAX_TOKENS // BLOCK)) * BLOCK


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

    @property
    def weights(self) -> list[Tensor]:
        return [*self.wg, *self.wu, *self.wd]

    @property
    def shape(self) -> Shape:
        kind = "none" if self.residual is None else "x" if self.residual is self.x else "own"
        return Shape(self.x.shape[-1], self.f, self.n, self.act, self.x.dtype, self.norm_eps, self.post_eps, kind)

    def refusal(self) -> str:
        """Why this call cannot run here; "" if it can."""
        x, residual = self.x, self.residual
        if x.dtype not in TYPES:
            return f"activations are {x.dtype}"
        if residual is not None and (
            residual.dtype != x.dtype
            or residual.shape[-1] != self.n
            or residual.numel() != x.numel() // x.shape[-1] * self.n
        ):
            return f"the residual is {residual.dtype} {list(residual.shape)}"
        if self.n % 2 and x.dtype != torch.float32:
            return f"rows of {self.n} 16-bit values do not end on a word"
        return ""


class Kernels:
    """Pipelines and scratch buffers of one shape, shared by all layers that have it."""

    def __init__(self, device: LogicalDevice, variant: Variant, shape: Shape) -> None:
        self._device, self._variant, self.shape = device, variant, shape
        tokens, groups_k, groups_f = shape.max_tokens, -(-shape.k // 32), -(-shape.f // 32)
        self.x = device.buffer(tokens * shape.k * shape.item, UPLOAD)
        self.residual = device.buffer(tokens * shape.n * shape.item if shape.residual == "own" else 0, UPLOAD)
        self.out = device.buffer(tokens * shape.n * shape.item, DOWNLOAD)
        self.grids = device.buffer(64, UPLOAD)
        self._a = device.buffer(tokens * groups_k * 32, DEVICE)
        self._a_scale = device.buffer(tokens * groups_k * 4, DEVICE)
        self._p = device.buffer(tokens * groups_f * 32, DEVICE)
        self._p_scale = device.buffer(tokens * groups_f * 4, DEVICE)
        self._y = device.buffer(tokens * -(-shape.n // 16) * 16 * 4, DEVICE)

    @staticmethod
    def bytes(shape: Shape) -> int:
        per_token = shape.k * (shape.item + 2) + shape.n * (2 * shape.item + 4) + shape.f * 2
        return shape.max_tokens * per_token

    def free(self) -> None:
        for buffer in (
            self.x,
            self.residual,
            self.out,
            self.grids,
            self._a,
            self._a_scale,
            self._p,
            self._p_scale,
            self._y,
        ):
            self._device.free(buffer)

    def record(self, weights: Weights, tokens: int, clock: Any = None) -> Recorded:
        """The region for `tokens` (a bucket) tokens; for 0 with grids that `set_grids` writes, through the GEMM."""
        form = "gemm" if tokens == 0 else "gemv"
        shape = self.shape
        x = self.residual if shape.residual == "own" else self.x
        grids: list[tuple[int, int] | int] = [0, 12, 24, 36]
        if tokens:
            grids = [(tokens, 1), (-(-shape.f // 32), 1), (-(-shape.n // 16), 1), (tokens, 1)]
        gate, gate_scale, up, up_scale, down, down_scale = weights.packed
        a = ((4, self._a), (5, self._a_scale))
        p = ((4, self._p), (5, self._p_scale))
        return self._device.record(
            [
                Dispatch(
                    self._rows("norm_quant", shape.k, shape.pre_eps),
                    ((0, self.x), (1, weights.pre), (6, self._a), (7, self._a_scale)),
                    grids[0],
                ),
                Dispatch(
                    self._product(form, "gate_up", tokens),
                    ((0, gate), (1, gate_scale), (2, up), (3, up_scale), *a, (6, self._p), (7, self._p_scale)),
                    grids[1],
                ),
                Dispatch(self._product(form, "down", tokens), ((0, down), (1, down_scale), *p, (6, self._y)), grids[2]),
                Dispatch(
                    self._rows("norm_add", shape.n, shape.post_eps),
                    ((0, self._y), (1, weights.post), (2, x), (6, self.out)),
                    grids[3],
                ),
            ],
            self.grids,
            clock,
        )

    def set_grids(self, tokens: int) -> None:
        """For the GEMM's command buffer: workgroups of its four dispatches."""
        shape, blocks = self.shape, -(-tokens // BLOCK)
        numbers = (blocks * BLOCK, 1, 1, -(-shape.f // BLOCK), blocks, 1, -(-shape.n // BLOCK), blocks, 1, tokens, 1, 1)
        ctypes.memmove(self.grids.address, (ctypes.c_uint32 * 12)(*numbers), 48)

    def _rows(self, name: str, width: int, eps: float | None) -> Any:
        shape = self.shape
        residual = int(shape.residual != "none")
        constants = [
            (0, ROW_THREADS),
            (1, width),
            (2, TYPES[shape.dtype]),
            (3, int(eps is not None)),
            (4, float(eps or 0.0)),
        ]
        return self._device.pipeline(variants.code(name), constants + [(5, residual)] * (name == "norm_add"))

    def _product(self, form: str, which: str, tokens: int) -> Any:
        shape, variant = self.shape, self._variant
        k, n = (shape.k, shape.f) if which == "gate_up" else (shape.f, shape.n)
        sizes = [(1, k), (2, n), (4, ACTIVATIONS.index(shape.act))]
        dot = "dot8" if variant.dot8 else "int"
        if form == "gemm":
            return self._device.pipeline(variants.code(f"ffn_w4g_gemm__{which}_{dot}"), sizes)
        threads = GATE_UP_THREADS if which == "gate_up" else DOWN_THREADS
        code = variants.code(f"ffn_w4g_gemv__{which}_{variant.name}")
        return self._device.pipeline(code, [(0, threads), *sizes, (3, tokens)], full_subgroups=variant.subgroup)


class Weights:
    """One region's weights as the device reads them."""

    def __init__(self, device: LogicalDevice, call: Call, placing: str) -> None:
        """`placing`: "shared" (the CPU's own pages), "mapped" (a copy that both see), "staged" (device memory)."""
        self._device = device
        self.packed: list[Buffer] = []
        self.alive = [w.detach() for w in call.weights]  # the pages of shared ones stay as long as this object
        for weight in self.alive:
            self.packed.append(_upload(device, weight, placing))
        self.pre = _scales(device, call.norm_w, call.norm_offset, call.x.shape[-1])
        self.post = _scales(device, call.post_w, call.post_offset, call.n)

    def free(self) -> None:
        for buffer in (*self.packed, self.pre, self.post):
            self._device.free(buffer)


def can_share(weights: Sequence[Tensor], alignment: int) -> bool:
    """True if these tensors have whole pages of anonymous memory to themselves."""
    arena = torch.classes.unicorn.Arena
    return bool(alignment) and all(
        arena.holds(w) and w.data_ptr() % alignment == 0 and alignment <= 4096 for w in weights
    )


def _upload(device: LogicalDevice, weight: Tensor, placing: str) -> Buffer:
    if placing == "shared":
        return device.imported(weight.data_ptr(), weight.nbytes)
    weight = weight.contiguous()
    if placing == "staged":
        return device.staged(weight.data_ptr(), weight.nbytes)
    buffer = device.buffer(weight.nbytes, UPLOAD)
    ctypes.memmove(buffer.address, weight.data_ptr(), weight.nbytes)
    return buffer


def _scales(device: LogicalDevice, w: Tensor | None, offset: float, width: int) -> Buffer:
    """fp32 [width]: what a norm multiplies with."""
    scale = torch.ones(width) if w is None else w.detach().float() + offset
    buffer = device.buffer(4 * width, UPLOAD)
    ctypes.memmove(buffer.address, scale.contiguous().data_ptr(), 4 * width)
    return buffer


def run(device: LogicalDevice, kernels: Kernels, recorded: Any, call: Call) -> Tensor:
    """`recorded(bucket)`: the command buffer for that many tokens. Raises VulkanError, TimeoutError."""
    shape = kernels.shape
    x = call.x.contiguous()
    residual = call.residual.contiguous() if shape.residual == "own" and call.residual is not None else None
    out = torch.empty((*x.shape[:-1], shape.n), dtype=x.dtype)
    total, first = x.numel() // shape.k, 0
    while first < total:
        tokens = min(total - first, BUCKETS[-1] if total <= BUCKETS[-1] else shape.max_tokens)
        bucket = next((b for b in BUCKETS if tokens <= b), 0)
        row_in, row_out = shape.k * shape.item, shape.n * shape.item
        ctypes.memmove(kernels.x.address, x.data_ptr() + first * row_in, tokens * row_in)
        if residual is not None:
            ctypes.memmove(kernels.residual.address, residual.data_ptr() + first * row_out, tokens * row_out)
        if bucket == 0:
            kernels.set_grids(tokens)
        device.run(recorded(bucket), spin=bucket != 0)
        ctypes.memmove(out.data_ptr() + first * row_out, kernels.out.address, tokens * row_out)
        first += tokens
    return out
