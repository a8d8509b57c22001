"""Masks and rotary tables become one op each, with the same bits; what is another computation stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from tests.graph.tracing import trace
from unicorn_backend.assets import load_native

load_native()
unicorn = torch.ops.unicorn


def operators(gm: GraphModule) -> list[Any]:
    """Targets of the operators; integer arithmetic left out."""
    return [n.target for n in gm.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]


def positions(x: torch.Tensor, past: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of queries [1, 1, T, 1] and keys [1, 1, 1, S] for x [T] after `past` tokens, of which 7 are kept."""
    kept = min(past, 7)
    queries = torch.arange(x.shape[0]) + past
    keys = torch.arange(kept + x.shape[0]) + max(past - 7, 0)
    return queries[None, None, :, None], keys[None, None, None, :]


def traced(mask: Callable[..., torch.Tensor], x: torch.Tensor, past: int) -> tuple[list[Any], torch.Tensor]:
    """The operators of the graph, and what it gives."""

    def with_tensor(x: torch.Tensor, past: int) -> tuple[torch.Tensor, torch.Tensor]:
        return mask(x, past), x.neg()  # a graph without a tensor among its inputs is none

    gm, _, inputs = trace(with_tensor, x, past, dynamic=True)[0]
    found = operators(gm)
    found.remove(torch.ops.aten.neg.default)
    return found, gm(*(int(size) if isinstance(size, torch.SymInt) else size for size in inputs))[0]


def sliding(x: torch.Tensor, past: int) -> torch.Tensor:
    q, k = positions(x, past)
    return q.new_ones((), dtype=torch.bool) & (k > q - 8).to(torch.bool) & (k <= q)


def causal(x: torch.Tensor, past: int) -> torch.Tensor:
    q, k = positions(x, past)
    return q >= k


def exchanged(x: torch.Tensor, past: int) -> torch.Tensor:
    q, k = positions(x, past)
    return (q < k + 5) & (k - 2 < q) & (q - 1 <= k + 9)


def not_whole(x: torch.Tensor, past: int) -> torch.Tensor:
    """A part of it is a band: that part becomes one."""
    q, k = positions(x, past)
    return ((k > q - 8) & (k <= q)) & (k != 3)


@pytest.mark.parametrize("mask", [sliding, causal, exchanged])
@pytest.mark.parametrize("tokens", [1, 6])
def test_a_mask_is_one_op(mask: Callable[..., torch.Tensor], tokens: int) -> None:
    for past in (3, 20):
        x = torch.zeros(tokens)
        found, result = traced(mask, x, past)
        assert found == [unicorn.band_mask.default]
        assert torch.equal(result, mask(x, past))


def test_a_part_of_a_mask() -> None:
    x = torch.zeros(6)
    found, result = traced(not_whole, x, 20)
    assert found.count(unicorn.band_mask.default) == 1
    assert torch.ops.aten.ne.Scalar in found
    assert torch.equal(result, not_whole(x, 20))


def by_a_tensor(x: torch.Tensor, past: int) -> torch.Tensor:
    q, k = positions(x, past)
    return k <= q + x.long()[None, None, :, None]


def of_queries_only(x: torch.Tensor, past: int) -> torch.Tensor:
    q, _ = positions(x, past)
    return (q > q - 3) & (q < past)


@pytest.mark.parametrize("mask", [by_a_tensor, of_queries_only])
def test_what_is_no_band_stays(mask: Callable[..., torch.Tensor]) -> None:
    x = torch.arange(6).float()
    found, result = traced(mask, x, 20)
    assert unicorn.band_mask.default not in found
    assert torch.equal(result, mask(x, 20))


def rotary(scale: float, dtype: torch.dtype) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    def tables(at: torch.Tensor, inv_freq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        half = at[..., None].float() * inv_freq.to(torch.float)
        angles = torch.cat((half, half), dim=-1)
        return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)

    return tables


@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rotary_tables_are_one_op(scale: float, dtype: torch.dtype) -> None:
    tables, at = rotary(scale, dtype), torch.arange(10).view(2, 5)
    inv_freq = torch.nn.Parameter(torch.rand(8))
    gm, _, inputs = trace(tables, at, inv_freq)[0]
    assert operators(gm) == [unicorn.rotary_tables.default]
    assert all(torch.equal(a, b) for a, b in zip(gm(*inputs), tables(at, inv_freq), strict=True))


def sin_only(at: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    half = at[..., None].float() * inv_freq
    return torch.cat((half, half), dim=-1).sin()


def scaled_apart(at: torch.Tensor, inv_freq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    half = at[..., None].float() * inv_freq
    angles = torch.cat((half, half), dim=-1)
    return angles.cos() * 2.0, angles.sin() * 3.0


def angles_too(at: torch.Tensor, inv_freq: torch.Tensor) -> tuple[torch.Tensor, ...]:
    half = at[..., None].float() * inv_freq
    angles = torch.cat((half, half), dim=-1)
    return angles.cos(), angles.sin(), angles


@pytest.mark.parametrize("tables", [sin_only, scaled_apart, angles_too])
def test_other_tables_stay(tables: Callable[..., Any]) -> None:
    gm, _, _ = trace(tables, torch.arange(10).view(2, 5), torch.nn.Parameter(torch.rand(8)))[0]
    assert unicorn.rotary_tables.default not in operators(gm)
