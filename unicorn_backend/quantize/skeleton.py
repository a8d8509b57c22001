"""A checkpoint's model without weights: what each stored tensor is to the model, and which scheme it gets.

Built on the meta device by transformers itself, so names, ties and dtypes are those of `from_pretrained`,
and the schemes are decided by the same `rewrite.plan` that quantizes a model in memory.
"""

from __future__ import annotations

import copy
import functools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    rename_source_key,
)

from unicorn_backend.errors import CheckpointError
from unicorn_backend.formats.nonsense import NONSENSE
from unicorn_backend.formats.safetensors import StackedTensor, StoredTensor
from unicorn_backend.quantize import experts, rewrite
from unicorn_backend.quantize.recipe import Recipe

Conversions = tuple[list[WeightRenaming], list[WeightConverter]]


@dataclass
class Skeleton:
    """The model on meta. `schemes`: parameter name -> scheme; `left`: module name -> why it stays float.

    stacks: weights of experts that are packed, each made of several stored tensors, by parameter name.
    """

    model: Any
    recipe: Recipe
    schemes: dict[str, str]
    left: dict[str, str]
    stacks: dict[str, StackedTensor] = field(default_factory=dict)

    @functools.cached_property
    def state(self) -> dict[str, torch.Tensor]:
        """The parameters and buffers on meta, by name. Walking the modules again per tensor is quadratic."""
        return dict(self.model.state_dict())

    @functools.cached_property
    def _conversions(self) -> Conversions:
        return conversions(self.model)

    def parameter_of(self, key: str) -> str | None:
        """Name in the model of a stored tensor; None if the model does not use it as it is stored.

        Tensors that transformers merges while loading (experts) have none: they are copied.
        """
        name, merged = rename_source_key(key, *self._conversions, self.model.base_model_prefix, self.state)
        if name not in self.state and key in self.state:
            name, merged = key, None
        return name if merged is None and name in self.state else None

    def is_merged(self, key: str) -> bool:
        """True for a stored tensor that becomes a part of a parameter."""
        return rename_source_key(key, *self._conversions)[1] is not None

    def dtype_of(self, name: str) -> torch.dtype:
        """Dtype that `from_pretrained(..., dtype="auto")` gives to a float tensor of the model."""
        plan = self.model._get_dtype_plan(self.model.dtype)
        if plan:
            pattern, globs, _ = build_glob_alternation(list(plan))
            if found := pattern.search(name):
                dtype: torch.dtype = plan[globs[found.lastgroup]]
                return dtype
        return self.state[name].dtype

    def tied_to(self, name: str) -> str | None:
        """The parameter that `name` shares its memory with, if it is the one that is not stored."""
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        source: str | None = tied.get(name)
        return source

    def missing(self, found: Iterable[str]) -> list[str]:
        """Parameters that none of the names in `found` gives."""
        there = set(found)
        names = [name for name in self.state if name not in there]
        return [name for name in names if self.tied_to(name) not in there]


def skeleton(
    config: Any,
    dtype: torch.dtype,
    recipe: str | Recipe,
    rules: rewrite.Rules | None,
    kept: Mapping[str, str] | None = None,
    tensors: Mapping[str, StoredTensor] | None = None,
) -> Skeleton:
    """The model of a config, on meta, with its decided schemes.

    kept: {module name: scheme that holds the stored values}; asked after `rules` and before the recipe.
    tensors: the checkpoint's; experts whose weights are made of them are packed, others stay as they are.
    """
    try:
        model = empty_model(config, dtype)
    except NONSENSE as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"config.json: describes no model: {error}") from error
    exact = {f"^{re.escape(name)}$": scheme for name, scheme in (kept or {}).items()}
    chosen = rewrite.resolve(model, Recipe.named(recipe).with_overrides(exact), rules)
    stacks = _stack_experts(model, chosen, tensors) if tensors is not None else {}
    jobs, left = rewrite.plan(model, chosen, getattr(model, "all_tied_weights_keys", None))
    schemes = {f"{name}.weight": job.scheme for job in jobs for name, _ in job.users}
    return Skeleton(model, chosen, schemes, left, stacks)


def conversions(model: Any) -> Conversions:
    """What transformers renames and what it merges while it loads a model."""
    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    return renamings, [step for step in steps if isinstance(step, WeightConverter)]


def _stack_experts(model: Any, recipe: Recipe, tensors: Mapping[str, StoredTensor]) -> dict[str, StackedTensor]:
    """Bring the experts of `model` that can be packed from these tensors into the form of a packed model."""
    found = experts.find_experts(model, recipe.scheme_for)
    parts = _expert_parts(model, tensors) if found else {}
    paths = {module: path for path, module in model.named_modules()}
    stacks: dict[str, StackedTensor] = {}
    for module in found:
        made = {}
        for name, linear, shape in experts.stacked_shapes(module):
            stored, turned = parts.get(f"{paths[module]}.{name}", []), experts.is_transposed(module)
            if not _are_rows(stored, shape[1], turned):
                break
            if (rows := sum(part.numel for part in stored) // shape[1]) != shape[0]:
                raise CheckpointError(
                    f"{stored[0].file.parent}: the experts of {paths[module]}.{name} have {rows} of {shape[0]} rows: "
                    "is a shard missing, or does config.json belong to another model?"
                )
            weight = f"{paths[module]}.{linear}.weight"
            made[weight] = StackedTensor(weight, stored[0].dtype, shape, stored[0].file, 0, tuple(stored), turned)
        else:
            experts.stack(module)
            stacks |= made
    return stacks


def _expert_parts(model: Any, tensors: Mapping[str, StoredTensor]) -> dict[str, list[StoredTensor]]:
    """Parameter of experts -> the stored tensors that it is made of, in the order of its rows.

    One 3-D tensor, or matrices that transformers merges: each expert's, those of a list under one another.
    """
    steps = conversions(model)
    state = dict(model.state_dict())
    order: dict[str, tuple[int, WeightConverter]] = {}
    for converter in steps[1]:
        order |= {pattern: (i, converter) for i, pattern in enumerate(converter.source_patterns)}
    found: dict[str, dict[tuple[int, int], StoredTensor]] = defaultdict(dict)
    for key, stored in tensors.items():
        name, pattern = rename_source_key(key, *steps, model.base_model_prefix, state)
        if pattern is None and len(stored.shape) == 3:
            found[name][0, 0] = stored
        elif pattern is not None and _merges_rows(order[pattern][1]):
            number = re.search(r"\.experts\.(\d+)\.", key)
            if number is not None:
                found[name][int(number[1]), order[pattern][0]] = stored
    return {name: [stored for _, stored in sorted(parts.items())] for name, parts in found.items()}


def _merges_rows(converter: WeightConverter) -> bool:
    """True where experts become the first dimension and several matrices of one are put under another."""
    steps = [
        (type(step), step.dim) for step in converter.operations if isinstance(step, (MergeModulelist, Concatenate))
    ]
    known = [(MergeModulelist, 0)] + [(Concatenate, 1)] * (len(converter.source_patterns) > 1)
    return len(steps) == len(converter.operations) and steps == known


def _are_rows(parts: list[StoredTensor], k: int, transposed: bool) -> bool:
    """True if these are float rows of `k` columns, all of one dtype."""
    across = -2 if transposed else -1
    return (
        bool(parts)
        and all(part.shape[across] == k and part.scheme is None and not part.type_name for part in parts)
        and len({part.dtype for part in parts}) == 1
    )


def empty_model(config: Any, dtype: torch.dtype) -> Any:
    """The model of a config, on meta."""
    with torch.device("meta"):
        return _model_class(config)._from_config(copy.deepcopy(config), dtype=dtype)


def _model_class(config: Any) -> Any:
    """The transformers class that the checkpoint was saved from, else the causal language model of its type."""
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, nn.Module):
            return found
    mapping = transformers.AutoModelForCausalLM._model_mapping
    if type(config) not in mapping:
        raise CheckpointError(
            f"config.json: transformers {transformers.__version__} has no model class for "
            f"{config.model_type!r} (architectures {config.architectures})"
        )
    return mapping[type(config)]
