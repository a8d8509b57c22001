"""Regions: matched subgraphs, described by data, before anything in the graph is changed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule, Node

from unicorn_backend.graph.pattern import Linear, Norm, Reason, Tail, aten, shape, static, value
from unicorn_backend.graph.rotary import Rotation

TILE_ROWS = 16  # rows of a packed weight tile: a row range of a packed weight must start and end on it


@dataclass(frozen=True)
class Ffn:
    """`down(act(gate(x)) * up(x))` with what surrounds it."""

    gate: Linear
    up: Linear
    down: Linear
    act: str
    norm: Norm | None
    tail: Tail
    cutoff: float | None = None  # see `sparse_ffn`

    kind = "ffn"

    @property
    def op(self) -> str:
        return "unicorn::int4_ffn" if self.cutoff is None else "unicorn::sparse_ffn"

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.gate, self.up, self.down


@dataclass(frozen=True)
class Attention:
    """Scaled dot-product attention and its output projection, with what surrounds them."""

    anchor: Node
    q: Node
    k: Node
    v: Node
    mask: Node | None
    causal: bool
    scale: float
    softcap: float
    out: Linear
    tail: Tail

    kind = "attention"
    op = "unicorn::int8_attention"

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (self.out,)


@dataclass(frozen=True)
class Qkv:
    """The three projections of one attention, with pre-norm, q/k norm and rotary embedding."""

    q: Linear
    k: Linear
    v: Linear
    heads: tuple[Node, Node, Node]  # final q, k, v nodes [B, H, T, D] that the op replaces
    norm: Norm | None
    q_norm: Norm | None
    k_norm: Norm | None
    v_norm: bool  # a norm without weight, of the eps of the other two
    rotation: Rotation | None

    kind = "qkv"
    op = "unicorn::int8_qkv"

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.q, self.k, self.v


@dataclass
class Match:
    """What a pattern pass found: regions, and reasons for what it left."""

    regions: list[Any] = field(default_factory=list)
    reasons: list[Reason] = field(default_factory=list)


def weight_arguments(gm: GraphModule, linear: Linear) -> list[Node]:
    """The weight list of `linear` as graph nodes; a row range becomes slices (views) of the tensors."""
    if linear.rows is None:
        return list(linear.weights)
    first, last = linear.rows
    packed = len(linear.weights) > 1
    step = TILE_ROWS if packed else 1
    return [_rows(gm, w, first // step, -(-last // step)) for w in linear.weights]


def bias_argument(gm: GraphModule, linear: Linear) -> Node | None:
    if linear.bias is None or linear.rows is None:
        return linear.bias
    return _rows(gm, linear.bias, *linear.rows)


def rows_fit(linear: Linear) -> bool:
    """True if the row range of `linear` can be taken as a view of its packed weight."""
    if linear.rows is None or len(linear.weights) == 1:
        return True
    first, last = linear.rows
    tiles = static(shape(linear.weights[0])[0])
    ends = last % TILE_ROWS == 0 or tiles == -(-last // TILE_ROWS)
    return first % TILE_ROWS == 0 and ends


def _rows(gm: GraphModule, node: Node, first: int, last: int) -> Node:
    part = gm.graph.call_function(aten.slice.Tensor, (node, 0, first, last))
    part.meta["val"] = value(node)[first:last]
    return part
