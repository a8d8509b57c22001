"""Masks and rotary tables: the bits of torch's operators."""

from __future__ import annotations

import pytest
import torch

from unicorn_backend import reference
from unicorn_backend.assets import load_native

load_native()
OPS = torch.ops.unicorn


@pytest.mark.parametrize("sizes", [(1, 1), (1, 9), (5, 5), (4, 9), (9, 4), (3, 0)])
def test_band_mask(sizes: tuple[int, int]) -> None:
    for lower, upper in ((-3, 0), (0, 0), (2, 1), (-100, 100), (-(2**40), 3), (-2, 2**40), (7, 20), (-20, -7)):
        wanted = reference.band_mask(*sizes, lower, upper)
        assert torch.equal(OPS.band_mask(*sizes, lower, upper), wanted), (lower, upper)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 0.8317])
@pytest.mark.parametrize("width", [2, 14, 64, 256])
def test_rotary_tables(dtype: torch.dtype, scale: float, width: int) -> None:
    inv_freq = 1.0 / (10000.0 ** (torch.arange(0, width, 2) / width))
    for positions in (torch.tensor([[0]]), torch.tensor([[131071]]), torch.arange(300).view(2, 150) * 97):
        found = OPS.rotary_tables(positions, inv_freq, scale, dtype)
        wanted = reference.rotary_tables(positions, inv_freq, scale, dtype)
        assert all(map(torch.equal, found, wanted))


def test_opcheck() -> None:
    torch.library.opcheck(OPS.band_mask.default, (3, 5, -1, 2))
    torch.library.opcheck(OPS.rotary_tables.default, (torch.arange(6).view(2, 3), torch.rand(8), 1.0, torch.bfloat16))


def test_wrong_arguments() -> None:
    with pytest.raises(RuntimeError, match=r"band_mask: got -1 queries"):
        OPS.band_mask(-1, 5, 0, 0)
    with pytest.raises(RuntimeError, match=r"rotary_tables: got positions \[3\]"):
        OPS.rotary_tables(torch.arange(3), torch.rand(8), 1.0, torch.float32)
