"""Models sharded by transformers' `tp_plan="auto"`: each process packs its part of every linear.

A weight is gathered, quantized whole and then cut, so that every scheme has the scales of the unsharded model: rows at
multiples of 16 (projections into heads and feed-forward, the head), columns at multiples of 32 (projections out of
them). transformers' forward of a sharded module computes with the float weight; the module's own replaces it, with a
hook that sums or gathers what the processes have. The table of an embedding stays whole in each: a token reads one row.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.tensor import DTensor, Replicate

from unicorn_backend.errors import QuantizationError
from unicorn_backend.layouts import GROUP, PARTS, ROWS, scheme_of
from unicorn_backend.quantize.modules import wrapped


@dataclass(frozen=True)
class Part:
    """What this process holds of a linear: part `rank` of `count` along `dim` of [N, K]."""

    dim: int
    rank: int
    count: int
    group: Any
    gather: bool  # the outputs of all processes are put together


class Shards:
    """The parts of all linears of a model that are to be packed. Raises QuantizationError for what cannot be cut."""

    def __init__(self, users: Iterable[tuple[str, nn.Module]]) -> None:
        self._parts = {module: part for name, module in users if (part := _part_of(name, module)) is not None}

    def whole(self, weight: Tensor) -> Tensor:
        """All of a sharded weight; a collective: every process calls it for the same weights in the same order."""
        full: Tensor = weight.full_tensor() if isinstance(weight, DTensor) else weight
        return full.contiguous()

    def cut(self, module: nn.Module, packed: list[Tensor]) -> list[Tensor]:
        """This process's part of the packed tensors of a whole weight."""
        part = self._parts.get(module)
        return packed if part is None else _cut(packed, part)

    def release(self, module: nn.Module) -> None:
        """Let the packed `module` compute with its own part, and put the processes' results together."""
        module.__dict__.pop("forward", None)
        part = self._parts.get(module)
        if part is None:
            return
        sizes: Any = module
        n, k = sizes.weight_shape
        sizes.weight_shape = (n // part.count, k) if part.dim == 0 else (n, k // part.count)
        sizes.out_features, sizes.in_features = sizes.weight_shape
        bias = module._parameters.get("bias")
        if bias is not None:
            local = bias.to_local() if isinstance(bias, DTensor) else bias
            keep = part.dim == 0 or part.rank == 0  # a sum over the processes has it once
            module._parameters["bias"] = nn.Parameter(local.detach(), requires_grad=False) if keep else None
        if part.dim == 1:
            module.register_forward_hook(lambda _module, _inputs, out: _sum(out, part.group))
        elif part.gather:
            module.register_forward_hook(lambda _module, _inputs, out: _gather(out, part.group))

    def finish(self, model: nn.Module) -> None:
        """Norms of heads go back to their own forward: transformers wraps it for the sake of gradients only."""
        for module in model.modules():
            if wrapped(module) and "is_already_hooked" in _closure(module):
                del module.forward


def _part_of(name: str, module: nn.Module) -> Part | None:
    weight: Any = module._parameters.get("weight")
    if not isinstance(weight, DTensor) or weight.placements == (Replicate(),) or isinstance(module, nn.Embedding):
        return None
    placement: Any
    mesh, placement, style = weight.device_mesh, weight.placements[0], _closure(module).get("self")
    if mesh.ndim != 1 or not placement.is_shard() or style is None:
        raise QuantizationError(
            f"{name}: sharded as {weight.placements} over {mesh}; allowed is one dimension of ranks"
        )
    dim = placement.dim % 2
    step = (ROWS, GROUP)[dim]
    if weight.shape[dim] % (step * mesh.size()):
        raise QuantizationError(
            f"{name}: {weight.shape[dim]} {('rows', 'columns')[dim]} do not split over {mesh.size()} processes at "
            f"multiples of {step}; use fewer processes"
        )
    gather = dim == 0 and isinstance(getattr(style, "output_layouts", None), Replicate)
    return Part(dim, mesh.get_local_rank(), mesh.size(), mesh.get_group(), gather)


def _cut(packed: list[Tensor], part: Part) -> list[Tensor]:
    kept = []
    for tensor, spec in zip(packed, PARTS[scheme_of(packed)], strict=True):
        axis = next((i for i, dim in enumerate(spec.dims) if str(dim).startswith("NK"[part.dim])), None)
        kept.append(tensor if axis is None else tensor.chunk(part.count, axis)[part.rank].contiguous())
    return kept


def _closure(module: nn.Module) -> dict[str, Any]:
    """What transformers' forward of a sharded module knows: its style ("self"), the mesh."""
    return dict(inspect.getclosurevars(module.__dict__["forward"]).nonlocals) if wrapped(module) else {}


def _sum(out: Tensor, group: Any) -> Tensor:
    total: Tensor = collectives.all_reduce(out.float(), "sum", group)
    return total.to(out.dtype)


def _gather(out: Tensor, group: Any) -> Tensor:
    return collectives.all_gather_tensor(out.contiguous(), out.dim() - 1, group)
