"""experts_linear: the rows that its experts give, as if each were a linear of its own."""

from __future__ import annotations

import pytest
import torch

from tests.ops.support import DTYPES, SCHEMES, make_weight
from unicorn_backend import reference

OPS = torch.ops.unicorn
E, N = 6, 48


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_are_those_of_a_linear_per_expert(isa: str, threads: int, scheme: str, dtype: torch.dtype) -> None:
    """x with one row per token and with one per slot; experts hit by none, by one and by many tokens."""
    k = 70
    w, bias = make_weight(E * N, k, scheme), torch.randn(E * N)
    for m, slots in ((1, 2), (3, 1), (21, 2)):
        experts = torch.randint(0, E - 1, (m, slots), generator=torch.Generator().manual_seed(m))
        for x in (torch.randn(m, k).to(dtype), torch.randn(m, slots, k).to(dtype)):
            got = OPS.experts_linear(x, experts, w, bias, N)
            every = OPS.linear(x, w, bias, E * N).unflatten(-1, (E, N))  # of all experts
            every = every if x.dim() == 3 else every[:, None].expand(-1, slots, -1, -1)
            want = every.gather(2, experts[..., None, None].expand(-1, -1, 1, N)).squeeze(2)
            assert got.dtype == dtype and torch.equal(got, want)
            assert torch.equal(
                reference.experts_linear(x, experts, w, bias, N),
                reference.linear(x, w, bias, E * N).unflatten(-1, (E, N))[
                    (torch.arange(m)[:, None], *([torch.arange(slots)] if x.dim() == 3 else []), experts)
                ],
            )


def test_bad_arguments() -> None:
    w = make_weight(E * N, 64, "w4g32")
    x, experts = torch.randn(2, 64), torch.tensor([[0, 1], [2, 3]])
    with pytest.raises(IndexError, match="got expert 6, allowed are 0 to 5"):
        OPS.experts_linear(x, experts + 3, w, None, N)
    with pytest.raises(RuntimeError, match="expected int64"):
        OPS.experts_linear(x, experts.int(), w, None, N)
    with pytest.raises(RuntimeError, match="x: got shape"):
        OPS.experts_linear(torch.randn(3, 64), experts, w, None, N)
    with pytest.raises(RuntimeError, match="multiple of 16"):
        OPS.experts_linear(x, experts, w, None, 40)
    torch.library.opcheck(OPS.experts_linear.default, (x, experts, w, None, N))
