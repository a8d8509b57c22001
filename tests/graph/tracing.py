"""Trace a function the way the backend sees it, without running the backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule

from unicorn_backend.graph.capture import normalise
from unicorn_backend.graph.region import Match
from unicorn_backend.graph.rewrite import rewrite


def trace(
    fn: Callable[..., Any], *inputs: Any, dynamic: bool | None = None, **kwargs: Any
) -> list[tuple[GraphModule, Match, list[Any]]]:
    """Every graph of one call: (rewritten graph, what was matched, its example inputs)."""
    found: list[tuple[GraphModule, Match, list[Any]]] = []

    def record(gm: GraphModule, example_inputs: list[Any]) -> Any:
        normal = normalise(gm)
        assert not isinstance(normal, str), normal
        found.append((normal, rewrite(normal), list(example_inputs)))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(specialize_float=True):
        torch.compile(fn, backend=record, dynamic=dynamic)(*inputs, **kwargs)
    assert found, "nothing was traced"
    return found


def kinds(match: Match) -> list[str]:
    return sorted(region.kind for region in match.regions)
