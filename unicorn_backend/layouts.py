"""Packed weight layouts: pack, exact unpack, dequantize. The byte diagrams are in `ops.py`.

Pure torch; the native quantizer writes the same bytes directly and the tests compare the two.
Padding rows and columns hold zero-valued weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 16  # rows of a tile: one zmm register of 16 int32 accumulators
GROUP = 32  # k per group: one scale of activations, and of w4g32 weights
W4_ZERO = 8  # nibble that stands for the value 0
W8_ZERO = 128  # byte that stands for the value 0 in w8c


def scheme_of(weights: list[Tensor]) -> str:
    """ "float", "w4g32", "w8c" or "w8a", from the list's length and shapes."""
    if len(weights) == 1:
        return "float"
    if len(weights) == 3:
        return "w8a"
    return "w4g32" if weights[0].shape[2] == 4 else "w8c"


def pack_w4g32(q: Tensor, s: Tensor) -> list[Tensor]:
    """int8 `q` [N, K] in -8..7 and fp16 `s` [N, ceil(K/32)] -> [w, s] of the contract."""
    return pack_nibbles((q + W4_ZERO).to(torch.uint8), s)


def pack_nibbles(nibbles: Tensor, s: Tensor) -> list[Tensor]:
    """`pack_w4g32` of values + 8, uint8 in 0..15."""
    nibbles = _pad(nibbles, W4_ZERO)
    n16, k32 = nibbles.shape[0] // ROWS, nibbles.shape[1] // GROUP
    tiles = nibbles.view(n16, ROWS, k32, 4, 2, 4)  # [i, r, g, c, half, j]
    w = (tiles[..., 0, :] | (tiles[..., 1, :] << 4)).permute(0, 2, 3, 1, 4)
    return [w.contiguous(), _tile_scales(s, n16)]


def unpack_w4g32(w: Tensor, s: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
    """Inverse of `pack_w4g32`: int8 [n, k] and fp16 [n, ceil(k/32)]."""
    n16, k32 = w.shape[:2]
    halves = torch.stack((w & 15, w >> 4), dim=-2)  # [i, g, c, r, half, j]
    q = halves.permute(0, 3, 1, 2, 4, 5).reshape(n16 * ROWS, k32 * GROUP).to(torch.int8) - W4_ZERO
    scales = s.permute(0, 2, 1).reshape(n16 * ROWS, k32)
    return q[:n, :k].contiguous(), scales[:n].contiguous()


def pack_w8(q: Tensor, s: Tensor, z: Tensor | None = None) -> list[Tensor]:
    """Stored bytes `q` uint8 [N, K], fp32 `s` [N], uint8 `z` [N] or None -> [w, s] or [w, s, z].

    Without `z` a byte means `byte - 128` (w8c), with it `byte - z` (w8a).
    """
    n, _ = q.shape
    n16 = -(-n // ROWS)
    zeros = torch.full((n16 * ROWS,), W8_ZERO, dtype=torch.uint8)
    if z is not None:
        zeros[:n] = z
    k32 = -(-q.shape[1] // GROUP)
    padded = zeros[:, None].repeat(1, k32 * GROUP)
    padded[:n, : q.shape[1]] = q
    w = padded.view(n16, ROWS, k32, 8, 4).permute(0, 2, 3, 1, 4).contiguous()
    scales = torch.zeros(n16 * ROWS, dtype=torch.float32)
    scales[:n] = s
    packed = [w, scales.view(n16, ROWS)]
    return packed if z is None else [*packed, zeros.view(n16, ROWS)]


def unpack_w8(weights: list[Tensor], n: int, k: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inverse of `pack_w8`: uint8 [n, k], fp32 [n], uint8 [n] or None."""
    w, s = weights[0], weights[1]
    q = w.permute(0, 3, 1, 2, 4).reshape(w.shape[0] * ROWS, w.shape[1] * GROUP)[:n, :k].contiguous()
    z = weights[2].reshape(-1)[:n].contiguous() if len(weights) == 3 else None
    return q, s.reshape(-1)[:n].contiguous(), z


def dequantize(weights: list[Tensor], n: int, k: int) -> Tensor:
    """Any weight list -> fp32 [n, k]: exactly the values that the kernels multiply with."""
    scheme = scheme_of(weights)
    if scheme == "float":
        return weights[0].float()
    if scheme == "w4g32":
        q, s = unpack_w4g32(weights[0], weights[1], n, k)
        return q.float() * s.float().repeat_interleave(GROUP, dim=1)[:, :k]
    bytes_, scale, zero = unpack_w8(weights, n, k)
    offset = torch.full((n, 1), float(W8_ZERO)) if zero is None else zero.float()[:, None]
    return (bytes_.float() - offset) * scale[:, None]


def packed_bytes(n: int, k: int, scheme: str) -> int:
    """Bytes of a packed [n, k] weight."""
    n16, k32 = -(-n // ROWS), -(-k // GROUP)
    if scheme == "w4g32":
        return n16 * k32 * ROWS * (GROUP // 2 + 2)
    return n16 * k32 * ROWS * GROUP + n16 * ROWS * (5 if scheme == "w8a" else 4)


def _pad(q: Tensor, fill: int) -> Tensor:
    n, k = q.shape
    return torch.nn.functional.pad(q, (0, -k % GROUP, 0, -n % ROWS), value=fill)


def _tile_scales(s: Tensor, n16: int) -> Tensor:
    n, groups = s.shape
    padded = torch.zeros(n16 * ROWS, groups, dtype=torch.float16)
    padded[:n] = s
    return padded.view(n16, ROWS, groups).permute(0, 2, 1).contiguous()
