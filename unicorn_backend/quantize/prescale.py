"""Scale the columns of weights, and undo it where their input comes from: the function stays, groups fit better.

A column that meets large activations deserves finer steps than its neighbours in the group. Multiplied by a factor
above 1 it gets them; the rows of the linear before, or the weight of the norm before, are divided by the same factor.
The idea is AWQ's. The factors are rms(activation)^0.2 of a calibration text: on the embedded model any exponent of
0.15 to 0.25 gains (4-bit recipes 4 to 14 % of the KL divergence), and a search per linear, for the least error of its
output, gains no more than 0.2 everywhere.

A link is taken when the model's logits stay the same to the last bit with random powers of two as its factors: those
commute with rounding, so every other difference means that somebody else reads the scaled values, or not linearly.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

EXPONENT = 0.1  # of the mean square
TRIED = 16  # tokens of the trial with powers of two


@dataclass(frozen=True)
class Link:
    """Channels of `producer` (a norm, or a linear's rows) that meet columns of `consumers`.

    channels: int64 [K], the producer's channel of each column. A value head serves several query heads.
    """

    kind: str
    producer: str
    consumers: tuple[str, ...]
    channels: Tensor


@dataclass(frozen=True)
class Scaling:
    """columns: {linear: fp32 [K]}, factors of its columns. rows: {linear: fp32 [N]}, divisors of its rows.

    norms: {norm: its new weight}. refused: why links were not taken.
    """

    columns: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    norms: Mapping[str, Tensor] = field(default_factory=dict)
    refused: tuple[str, ...] = ()

    def apply(self, names: Iterable[str], weight: Tensor, first: int = 0) -> Tensor:
        """Rows first.. of the weight that these linears share; fp32 if there is anything to scale."""
        for name in names:
            if name in self.rows:
                weight = weight.float() / self.rows[name][first : first + len(weight), None]
            if name in self.columns:
                weight = weight.float() * self.columns[name]
        return weight


def find(model: nn.Module, ids: Tensor) -> tuple[list[Link], list[str]]:
    """(links of a float model, why others are none). ids: int64 [1, T], tokens for the trials."""
    ids = ids[:, :TRIED]
    after_norms, plain = _after_norms(model, ids)
    candidates = [*after_norms, *_inside_blocks(model)]
    links, refused = [], []
    for kind, group in groupby(sorted(candidates, key=lambda link: link.kind), key=lambda link: link.kind):
        found = list(group)
        if torch.equal(_scaled_logits(model, ids, found), plain):
            links += found
        else:
            refused.append(f"columns are not scaled {kind}: the model does more there than pass the values on")
            log.warning("%s", refused[-1])
    return links, refused


def scaling(
    model: nn.Module, ids: Tensor, importance: Mapping[str, Tensor], takes_part: Callable[[str], bool]
) -> Scaling:
    """The factors for a float model.

    importance: {linear: fp32 [K]}, the mean squares of its inputs. takes_part: whether a linear's weight may change.
    """
    links, refused = find(model, ids)
    columns: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    norms: dict[str, Tensor] = {}
    for link in links:
        producer = model.get_submodule(link.producer)
        linears = [*link.consumers, *([link.producer] if isinstance(producer, nn.Linear) else [])]
        if not all(name in importance and takes_part(name) for name in linears):
            continue
        factors = _factors(importance[link.consumers[0]], link.channels)
        if isinstance(producer, nn.Linear):
            rows[link.producer] = factors
        else:
            norms[link.producer], factors = _divided(producer, factors)
        columns.update(dict.fromkeys(link.consumers, factors[link.channels]))
    return Scaling(columns, rows, norms, tuple(refused))


def _factors(importance: Tensor, channels: Tensor) -> Tensor:
    """fp32 [channels of the producer], of geometric mean 1."""
    logs = importance.log() * EXPONENT
    count = int(channels.max()) + 1
    sums = torch.zeros(count).index_add_(0, channels, logs)
    means = sums / torch.bincount(channels, minlength=count)
    return (means - means.mean()).exp()


def _divided(norm: nn.Module, factors: Tensor) -> tuple[Tensor, Tensor]:
    """(the norm's weight for an output divided by the factors, in its dtype, and the factors that rounding left)."""
    weight: Any = norm.weight
    offset = _offset(norm)
    assert offset is not None
    gain = weight.detach().float() + offset
    new = (gain / factors - offset).to(weight.dtype)
    exact = gain / (new.float() + offset)
    usable = torch.isfinite(exact) & (exact > 0)
    return torch.where(usable, new, weight.detach()), torch.where(usable, exact, torch.ones_like(exact))


def _offset(norm: nn.Module) -> float | None:
    """0 for a norm that multiplies with its weight, 1 for one plus it (Gemma), None for anything else."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, nn.Parameter):
        return None
    x = torch.arange(1, len(weight) + 1, dtype=weight.dtype)[None]
    for offset in (0.0, 1.0):
        outputs = [
            torch.func.functional_call(norm, {"weight": torch.full_like(weight, value - offset)}, (x,))
            for value in (0.0, 1.0, 2.0)
        ]
        if outputs[0].abs().max() == 0 and torch.equal(outputs[1] * 2, outputs[2]):
            return offset
    return None


def _after_norms(model: nn.Module, ids: Tensor) -> tuple[list[Link], Tensor]:
    """Linears whose input is the very tensor that a norm gave; the logits of the run that shows it."""
    given: dict[int, tuple[str, Tensor]] = {}
    taken: dict[str, list[str]] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if len(inputs) == 1 and isinstance(output, Tensor):
                given[id(output)] = (name, output)  # held: an id is given again after its object's end

        return hook

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any) -> None:
            if inputs and id(inputs[0]) in given:
                taken.setdefault(given[id(inputs[0])][0], []).append(name)

        return hook

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                hooks.callback(module.register_forward_pre_hook(look(name)).remove)
            elif [weight.dim() for weight in module.parameters()] == [1]:
                hooks.callback(module.register_forward_hook(note(name)).remove)
        logits = _logits(model, ids)
    links = []
    for name, linears in taken.items():
        norm = model.get_submodule(name)
        if _offset(norm) is not None:
            kind = "between norm and " + ", ".join(linear.rpartition(".")[2] for linear in linears)
            links.append(Link(kind, name, tuple(linears), torch.arange(len(norm.weight))))  # type: ignore[arg-type]
    return links, logits


def _inside_blocks(model: nn.Module) -> Iterator[Link]:
    """up -> down of gated feed-forwards (gate, up, down), v -> o of attention (q, k, v, o)."""
    for owner_name, owner in model.named_modules():
        linears = [(name, module) for name, module in owner.named_children() if isinstance(module, nn.Linear)]
        shapes = [(module.in_features, module.out_features) for _, module in linears]
        names = [f"{owner_name}.{name}" for name, _ in linears]
        if len(linears) == 3 and shapes[0] == shapes[1] == shapes[2][::-1]:
            yield Link(_between(linears[1:]), names[1], (names[2],), torch.arange(shapes[1][1]))
        if len(linears) == 4 and shapes[1] == shapes[2] and shapes[0] == shapes[3][::-1]:
            channels = _value_channels(shapes[2][1], shapes[3][0], getattr(owner, "head_dim", None))
            if shapes[0][0] == shapes[2][0] and channels is not None:
                yield Link(_between(linears[2:]), names[2], (names[3],), channels)


def _between(pair: list[tuple[str, nn.Linear]]) -> str:
    return f"between {pair[0][0]} and {pair[1][0]}"


def _value_channels(values: int, columns: int, head: int | None) -> Tensor | None:
    """The value's channel of each column of the output projection; None where heads cannot be told."""
    if values == columns:
        return torch.arange(values)
    if not isinstance(head, int) or values % head or columns % values:
        return None
    heads = torch.arange(values).view(-1, 1, head)
    return heads.expand(-1, columns // values, -1).reshape(-1)


def _logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _scaled_logits(model: nn.Module, ids: Tensor, links: list[Link]) -> Tensor:
    """The logits with every producer divided by 1/2, 1 or 2 per channel and every consumer's input multiplied."""
    generator = torch.Generator().manual_seed(0)
    with ExitStack() as hooks:
        for link in links:
            count = int(link.channels.max()) + 1
            factors = 2.0 ** torch.randint(-1, 2, (count,), generator=generator)
            producer = model.get_submodule(link.producer)
            hooks.callback(producer.register_forward_hook(_divider(factors)).remove)
            for name in link.consumers:
                consumer = model.get_submodule(name)
                hooks.callback(consumer.register_forward_pre_hook(_multiplier(factors[link.channels])).remove)
        return _logits(model, ids)


def _divider(factors: Tensor) -> Any:
    return lambda module, inputs, output: output / factors.to(output.dtype)


def _multiplier(factors: Tensor) -> Any:
    return lambda module, inputs: (inputs[0] * factors.to(inputs[0].dtype), *inputs[1:])
