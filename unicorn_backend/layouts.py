"""Packed weight layouts: pack, exact unpack, dequantize. The byte diagrams are in `ops.py`.

Pure torch; the native quantizer writes the same bytes directly and the tests compare the two.
Padding rows and columns hold zero-valued weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ROWS = 16  # rows of a tile: one zmm register of 16 int32 accumulators
GROUP = 32  # k per group: one scale of activations, and of w4g32 weights
W4_ZERO = 8  # nibble that stands for the value 0
Q6_ZERO = 32  # what stands for 0 in q6k
ROW_SCALE = 4  # bytes of the scale after an int8 row of K or V
W8_ZERO = 128  # byte that stands for the value 0 in w8c


# The integers that the 16 nibbles of w4n32 stand for: those of GGUF's IQ4_NL. On N(0, 1) the best table of 16
# differs by 2 at most and lowers the error from 7.32 % to 7.27 %.
CODEBOOK = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

Dims = tuple[int | str, ...]


@dataclass(frozen=True)
class Part:
    """One tensor of a packed weight; `dims` may name N16, K32 and K256 (`ops.py`)."""

    buffer: str
    dtype: torch.dtype
    dims: Dims

    @property
    def tiled(self) -> bool:
        """False for what the whole weight shares."""
        return self.dims[0] == "N16"


def _four(bits: int = 4) -> Part:
    return Part("weight_packed", torch.uint8, ("N16", "K32", bits, ROWS, 4))


_ROW_SCALE = Part("weight_scale", torch.float32, ("N16", ROWS))
_GROUP_SCALE = Part("weight_scale", torch.float16, ("N16", "K32", ROWS))

SUPER = 8  # groups that share the fp16 scales of a k-quant: 256 columns


def _pairs(dtype: torch.dtype) -> Part:
    return Part("weight_scale", dtype, ("N16", "K32", 2, ROWS))


def _super(count: int) -> Part:
    return Part("weight_super_scale", torch.float16, ("N16", "K256", count, ROWS))


# The packed tensors of each scheme, in the order of the contract. No two schemes have the same dtypes and bits.
PARTS: dict[str, tuple[Part, ...]] = {
    "w4g32": (_four(), _GROUP_SCALE),
    "w4n32": (_four(), _GROUP_SCALE, Part("weight_codebook", torch.int8, (16,))),
    "w4m32": (_four(), _GROUP_SCALE, Part("weight_minimum", torch.float16, ("N16", "K32", ROWS))),
    "q4k": (_four(), _pairs(torch.uint8), _super(2)),
    "q5k": (_four(5), _pairs(torch.uint8), _super(2)),
    "q6k": (_four(6), _pairs(torch.int8), _super(1)),
    "w8c": (_four(8), _ROW_SCALE),
    "w8a": (_four(8), _ROW_SCALE, Part("weight_zero_point", torch.uint8, ("N16", ROWS))),
    "w8g32": (_four(8), _GROUP_SCALE),
}
SCHEMES = tuple(PARTS)
BUFFERS = tuple(dict.fromkeys(part.buffer for parts in PARTS.values() for part in parts))


def signature(parts: Iterable[tuple[torch.dtype, Sequence[Any]]]) -> tuple[Any, ...]:
    """What tells one scheme's tensors (dtype, shape) from another's: dtypes, and bytes of a row's four columns."""
    parts = list(parts)
    return (int(parts[0][1][2]), *(dtype for dtype, _ in parts))


_BY_SIGNATURE = {signature((part.dtype, part.dims) for part in parts): name for name, parts in PARTS.items()}


def scheme_of(weights: Sequence[Tensor]) -> str:
    """ "float", or the scheme of a list of packed tensors, from its dtypes and shapes."""
    if len(weights) == 1:
        return "float"
    return _BY_SIGNATURE[signature((t.dtype, t.shape) for t in weights)]


def part_shape(part: Part, n: int, k: int) -> tuple[int, ...]:
    """Shape of a part of a packed [n, k] weight."""
    named = {"N16": -(-n // ROWS), "K32": -(-k // GROUP), "K256": -(-k // (GROUP * SUPER))}
    return tuple(named[d] if isinstance(d, str) else d for d in part.dims)


def empty_packed(n: int, k: int, scheme: str, device: torch.device | str = "cpu") -> list[Tensor]:
    """Uninitialised packed tensors for a weight [n, k]: the shapes and dtypes of the contract."""
    return [torch.empty(part_shape(part, n, k), dtype=part.dtype, device=device) for part in PARTS[scheme]]


def buffers_of(scheme: str) -> list[str]:
    """Names of the packed tensors in a module."""
    return [part.buffer for part in PARTS[scheme]]


def codebook() -> Tensor:
    """int8 [16], the table of w4n32."""
    return torch.tensor(CODEBOOK, dtype=torch.int8)


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


def pack_w4n32(nibbles: Tensor, s: Tensor) -> list[Tensor]:
    """Indices into the codebook, uint8 [N, K] in 0..15, and fp16 `s` [N, ceil(K/32)] -> [w, s, c] of the contract."""
    return [*pack_nibbles(nibbles, s), codebook()]


def unpack_w4g32(w: Tensor, s: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
    """Inverse of `pack_w4g32`: int8 [n, k] and fp16 [n, ceil(k/32)]."""
    n16, k32 = w.shape[:2]
    halves = torch.stack((w & 15, w >> 4), dim=-2)  # [i, g, c, r, half, j]
    q = halves.permute(0, 3, 1, 2, 4, 5).reshape(n16 * ROWS, k32 * GROUP).to(torch.int8) - W4_ZERO
    return q[:n, :k].contiguous(), _untile_scales(s)[:n].contiguous()


def pack_w8(q: Tensor, s: Tensor, z: Tensor | None = None) -> list[Tensor]:
    """Stored bytes `q` uint8 [N, K], fp32 `s` [N], uint8 `z` [N] or None -> [w, s] or [w, s, z].

    Without `z` a byte means `byte - 128` (w8c), with it `byte - z` (w8a).
    """
    n, _ = q.shape
    n16 = -(-n // ROWS)
    zeros = torch.full((n16 * ROWS,), W8_ZERO, dtype=torch.uint8)
    if z is not None:
        zeros[:n] = z
    scales = torch.zeros(n16 * ROWS, dtype=torch.float32)
    scales[:n] = s
    packed = [_tile_bytes(q, zeros), scales.view(n16, ROWS)]
    return packed if z is None else [*packed, zeros.view(n16, ROWS)]


def pack_w8g32(q: Tensor, s: Tensor) -> list[Tensor]:
    """int8 `q` [N, K] and fp16 `s` [N, ceil(K/32)] -> [w, s] of the contract."""
    n16 = -(-q.shape[0] // ROWS)
    unsigned = (q.to(torch.int16) + W8_ZERO).to(torch.uint8)
    return [_tile_bytes(unsigned, torch.full((n16 * ROWS,), W8_ZERO, dtype=torch.uint8)), _tile_scales(s, n16)]


def unpack_w8g32(w: Tensor, s: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
    """Inverse of `pack_w8g32`: int8 [n, k] and fp16 [n, ceil(k/32)]."""
    q = (_untile_bytes(w, n, k).to(torch.int16) - W8_ZERO).to(torch.int8)
    return q, _untile_scales(s)[:n].contiguous()


def _tile_bytes(q: Tensor, fill: Tensor) -> Tensor:
    """uint8 [N, K] -> 8-bit tiles, padded with the row's entry of `fill` [16 * N16]."""
    k32 = -(-q.shape[1] // GROUP)
    padded = fill[:, None].repeat(1, k32 * GROUP)
    padded[: q.shape[0], : q.shape[1]] = q
    return padded.view(-1, ROWS, k32, 8, 4).permute(0, 2, 3, 1, 4).contiguous()


def _untile_bytes(w: Tensor, n: int, k: int) -> Tensor:
    return w.permute(0, 3, 1, 2, 4).reshape(w.shape[0] * ROWS, w.shape[1] * GROUP)[:n, :k].contiguous()


def unpack_w8(weights: list[Tensor], n: int, k: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inverse of `pack_w8`: uint8 [n, k], fp32 [n], uint8 [n] or None."""
    w, s = weights[0], weights[1]
    q = _untile_bytes(w, n, k)
    z = weights[2].reshape(-1)[:n].contiguous() if len(weights) == 3 else None
    return q, s.reshape(-1)[:n].contiguous(), z


def pack_w4m32(q: Tensor, s: Tensor, m: Tensor) -> list[Tensor]:
    """uint8 `q` [N, K] in 0..15, fp16 `s` and `m` [N, ceil(K/32)] -> [w, s, m]; value = s * q + m."""
    w, scales = pack_nibbles(_pad(q, 0), s)
    return [w, scales, _tile_scales(m, w.shape[0])]


def unpack_w4m32(w: Tensor, s: Tensor, m: Tensor, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse of `pack_w4m32`: uint8 [n, k], fp16 and fp16 [n, ceil(k/32)]."""
    q, scales = unpack_w4g32(w, s, n, k)
    return (q + W4_ZERO).to(torch.uint8), scales, _untile_scales(m)[:n].contiguous()


def pack_kquant(q: Tensor, pairs: Tensor, supers: Tensor, bits: int) -> list[Tensor]:
    """A k-quant -> [w, s, d] of the contract. K is a multiple of 256.

    q4k, q5k (bits 4, 5): `q` uint8 [N, K], `pairs` uint8 [N, K/32, 2] (scale, minimum), `supers` fp16 [N, K/256, 2].
    q6k: `q` uint8 [N, K] in 0..63, `pairs` int8 [N, K/32, 2] (of each half group), `supers` fp16 [N, K/256, 1].
    """
    n16 = -(-q.shape[0] // ROWS)
    q = _pad(q, Q6_ZERO if bits == 6 else 0)
    parts = [pack_nibbles(q & 15, supers[..., 0].new_zeros(q.shape[0], q.shape[1] // GROUP))[0]]
    if bits > 4:
        parts.append(_tile_high_bits(q >> 4, bits - 4))
    return [torch.cat(parts, dim=2), _tile_pairs(pairs, n16), _tile_pairs(supers, n16)]


def unpack_kquant(weights: list[Tensor], n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse of `pack_kquant`: (q, pairs, supers)."""
    w, pairs, supers = weights
    n16, k32, bits = w.shape[:3]
    low, _ = unpack_w4g32(w[:, :, :4], pairs[:, :, 0], n16 * ROWS, k32 * GROUP)
    q = (low + W4_ZERO).to(torch.uint8)
    if bits > 4:
        q = q | (_untile_high_bits(w[:, :, 4:], bits - 4) << 4)
    return q[:n], _untile_pairs(pairs)[:n], _untile_pairs(supers)[:n]


def _tile_high_bits(high: Tensor, bits: int) -> Tensor:
    """uint8 [16 * N16, K], 1 or 2 bits each -> [N16, K32, bits, 16, 4]; lowest bits: first chunk of an 8-bit tile."""
    tiles = high.view(-1, ROWS, high.shape[1] // GROUP, 8, 4).permute(0, 2, 3, 1, 4)  # [i, g, c, r, j]
    tiles = tiles.reshape(*tiles.shape[:2], bits, 8 // bits, ROWS, 4)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None, None]
    return (tiles << shifts).sum(3, dtype=torch.uint8)


def _untile_high_bits(w: Tensor, bits: int) -> Tensor:
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None, None]
    tiles = (w[:, :, :, None] >> shifts) & ((1 << bits) - 1)
    tiles = tiles.reshape(*w.shape[:2], 8, ROWS, 4).permute(0, 3, 1, 2, 4)
    return tiles.reshape(w.shape[0] * ROWS, w.shape[1] * GROUP)


def _tile_pairs(pairs: Tensor, n16: int) -> Tensor:
    """[N, groups, P] -> [N16, groups, P, 16]."""
    n, groups, count = pairs.shape
    padded = pairs.new_zeros(n16 * ROWS, groups, count)
    padded[:n] = pairs
    return padded.view(n16, ROWS, groups, count).permute(0, 2, 3, 1).contiguous()


def _untile_pairs(pairs: Tensor) -> Tensor:
    n16, groups, count, _ = pairs.shape
    return pairs.permute(0, 3, 1, 2).reshape(n16 * ROWS, groups, count)


def unpack(weights: list[Tensor], n: int, k: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Any packed list -> (integers, fp32 scales, fp32 minima or None): value = integer * scale + minimum.

    Integers fp32 [n, k], exact (of q6k with the scale of their half group); scales and minima fp32 [n, groups] with
    one group per 32 columns, exact; scales [n, 1] where they are per row.
    """
    scheme = scheme_of(weights)
    if scheme in ("q4k", "q5k", "q6k"):
        return _unpack_kquant(weights, n, k)
    if scheme == "w4m32":
        q, s, m = unpack_w4m32(weights[0], weights[1], weights[2], n, k)
        return q.float(), s.float(), m.float()
    if scheme == "w4g32":
        q, s = unpack_w4g32(weights[0], weights[1], n, k)
    elif scheme == "w4n32":
        index, s = unpack_w4g32(weights[0], weights[1], n, k)
        q = weights[2][index.long() + W4_ZERO]
    elif scheme == "w8g32":
        q, s = unpack_w8g32(weights[0], weights[1], n, k)
    else:
        bytes_, scale, zero = unpack_w8(weights, n, k)
        offset = torch.full((n, 1), float(W8_ZERO)) if zero is None else zero.float()[:, None]
        return bytes_.float() - offset, scale[:, None], None
    return q.float(), s.float(), None


def _unpack_kquant(weights: list[Tensor], n: int, k: int) -> tuple[Tensor, Tensor, Tensor | None]:
    q, pairs, supers = unpack_kquant(weights, n)
    d = supers.float().repeat_interleave(SUPER, dim=1)[:, : pairs.shape[1]]
    if scheme_of(weights) == "q6k":
        halves = pairs.float().flatten(1).repeat_interleave(GROUP // 2, dim=1)
        return ((q.float() - Q6_ZERO) * halves)[:, :k], d[..., 0], None
    scales = d * pairs.float()
    return q[:, :k].float(), scales[..., 0], -scales[..., 1]


def dequantize(weights: list[Tensor], n: int, k: int) -> Tensor:
    """Any weight list -> fp32 [n, k]: exactly the values that the kernels multiply with."""
    if scheme_of(weights) == "float":
        return weights[0].float()
    q, s, m = unpack(weights, n, k)
    values = q * per_column(s, k)
    return values if m is None else values + per_column(m, k)


def per_column(s: Tensor, k: int) -> Tensor:
    """[n, groups] -> [n, k], or [n, 1] as it is."""
    return s if s.shape[1] == 1 else s.repeat_interleave(GROUP, dim=1)[:, :k]


def packed_bytes(n: int, k: int, scheme: str) -> int:
    """Bytes of a packed [n, k] weight."""
    return sum(math.prod(part_shape(part, n, k)) * part.dtype.itemsize for part in PARTS[scheme])


def _pad(q: Tensor, fill: int) -> Tensor:
    n, k = q.shape
    return torch.nn.functional.pad(q, (0, -k % GROUP, 0, -n % ROWS), value=fill)


def _tile_scales(s: Tensor, n16: int) -> Tensor:
    n, groups = s.shape
    padded = torch.zeros(n16 * ROWS, groups, dtype=torch.float16)
    padded[:n] = s
    return padded.view(n16, ROWS, groups).permute(0, 2, 1).contiguous()


def _untile_scales(s: Tensor) -> Tensor:
    return s.permute(0, 2, 1).reshape(s.shape[0] * ROWS, s.shape[1])
