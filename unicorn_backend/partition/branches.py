"""Which placed calls a device can compute while something else is computed: parallel branches of a block.

In a sequential decoder there is none: each region reads what the one before it wrote. Blocks whose attention and
feed-forward read the same input (Cohere), and a shared expert beside routed ones (Qwen2-MoE, GLM4-MoE), have one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from unicorn_backend.graph.describe import OPS
from unicorn_backend.runtime import placed


@dataclass(frozen=True)
class Span:
    """A call begins behind `start` and must have ended before `end`; `between`: regions that are computed meanwhile."""

    start: Node
    end: Node
    between: tuple[Node, ...]

    @property
    def beside(self) -> list[str]:
        """Their kinds."""
        return sorted({OPS[node.target][0] for node in self.between})


def spans(gm: GraphModule, chosen: Mapping[Node, placed.Site]) -> dict[Node, Span]:
    """Placed calls with regions elsewhere that neither feed them nor read them, and where these are.

    A residual (the last argument) is no input here: the CPU adds it. Calls of one device take turns: a span ends at the
    next of them.
    """
    nodes = list(gm.graph.nodes)
    order = {node: index for index, node in enumerate(nodes)}
    inputs = sum(node.op == "placeholder" for node in nodes)
    found: dict[Node, Span] = {}
    for node, site in chosen.items():
        if site.op not in placed.DEFERRED or site.follows or not (site.device and site.device.defers and node.users):
            continue
        same = [order[other] for other, its in chosen.items() if its.device is site.device and other is not node]
        arguments = itertools.chain(*(a if isinstance(a, (list, tuple)) else [a] for a in node.args[:-1]))
        needed = [order[found[n].end if n in found else n] for n in arguments if isinstance(n, Node)]
        start = max([inputs - 1, *needed, *(at for at in same if at < order[node])])
        end = min([*(order[user] for user in node.users), *(at for at in same if at > order[node])])
        between = [n for n in nodes[start + 1 : end] if n.target in OPS and n is not node]
        between = [n for n in between if OPS[n.target][0] not in ("norm", "embedding")]
        if between:
            found[node] = Span(nodes[start], nodes[end], tuple(between))
    return found
