"""A checkpoint's model without weights: what each stored tensor is to the model, and which scheme it gets.

Built on the meta device by transformers itself, so names, ties and dtypes are those of `from_pretrained`,
and the schemes are decided by the same `rewrite.plan` that quantizes a model in memory.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    rename_source_key,
)

from unicorn_backend.errors import CheckpointError
from unicorn_backend.quantize import rewrite
from unicorn_backend.quantize.recipe import Recipe


@dataclass
class Skeleton:
    """The model on meta. `schemes`: parameter name -> scheme; `left`: module name -> why it stays float."""

    model: Any
    recipe: Recipe
    schemes: dict[str, str]
    left: dict[str, str]

    @functools.cached_property
    def state(self) -> dict[str, torch.Tensor]:
        """The parameters and buffers on meta, by name. Walking the modules again per tensor is quadratic."""
        return dict(self.model.state_dict())

    @functools.cached_property
    def _conversions(self) -> tuple[list[WeightRenaming], list[WeightConverter]]:
        """What transformers renames and what it merges while it loads this model."""
        steps = get_model_conversion_mapping(self.model)
        renamings = [step for step in steps if isinstance(step, WeightRenaming)]
        return renamings, [step for step in steps if isinstance(step, WeightConverter)]

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
) -> Skeleton:
    """The model of a config, on meta, with its decided schemes.

    kept: {module name: scheme that holds the stored values}; asked after `rules` and before the recipe.
    """
    model = empty_model(config, dtype)
    exact = {f"^{re.escape(name)}$": scheme for name, scheme in (kept or {}).items()}
    chosen = rewrite.resolve(model, Recipe.named(recipe).with_overrides(exact), rules)
    jobs, left = rewrite.plan(model, chosen, getattr(model, "all_tied_weights_keys", None))
    schemes = {f"{name}.weight": job.scheme for job in jobs for name, _ in job.users}
    return Skeleton(model, chosen, schemes, left)


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
