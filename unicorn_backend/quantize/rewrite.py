"""Quantize a model in place: walk, check every weight, then replace them one by one.

A weight that cannot be quantized (NaN, Inf, a meta tensor) is found before the first one is touched,
by a scan that reads memory once, so an error leaves the model as it was. Small weights come first and
each float weight is let go before the next one is packed: when the embedding (the largest) is packed,
the rest is small already, and the peak is the float model itself.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from unicorn_backend.errors import OptionError, QuantizationError
from unicorn_backend.layouts import SCHEMES
from unicorn_backend.quantize import experts
from unicorn_backend.quantize.calibration import SAMPLE, Calibration, calibrate, on_grid
from unicorn_backend.quantize.memory import MappedFiles
from unicorn_backend.quantize.modules import (
    QuantEmbedding,
    QuantLinear,
    pack_module,
    refusal,
    unpack_module,
    weights_read,
    wrapped,
)
from unicorn_backend.quantize.recipe import FLOAT, Recipe, recipes
from unicorn_backend.quantize.schemes import ensure_kernels, quantization_noise_reference, quantize_weight
from unicorn_backend.quantize.structure import is_language_model

__all__ = ["is_language_model", "quantization_report", "quantize", "recipes", "restore"]

PROGRESS_BYTES = 1_000_000_000  # below it a model is done before a bar can be read

Rules = Mapping[str, str | None] | Callable[[str, nn.Module], str | None]


@dataclass
class Job:
    """One weight to pack, and the modules that share it (the first one saves it)."""

    weight: nn.Parameter
    scheme: str
    users: list[tuple[str, nn.Module]] = field(default_factory=list)


@dataclass(frozen=True)
class ModuleReport:
    """What happened to one weight [N, K]. `scheme` "float": left, `reason` says why.

    bytes_after is 0 for the second user of a shared weight; sqnr_db needs keep_weights.
    """

    name: str
    scheme: str
    shape: tuple[int, int]
    bytes_before: int
    bytes_after: int
    sqnr_db: float | None = None
    reason: str = ""


def quantize(
    model: nn.Module,
    recipe: str | Recipe = "default",
    *,
    calibration: Tensor | None = None,
    outlier_bits: float = 0.0,
    keep_weights: bool = False,
    progress: bool | None = None,
    rules: Rules | None = None,
) -> nn.Module:
    """Quantize the weights of `model` in place, for inference, and return it.

    recipe: a name from `recipes()`, or a `Recipe`.
    calibration: token ids int64 [B, T]; the float model runs on them, and what the columns of its weights meet weighs
        their errors and scales them first (undone in the norm or linear before: the function stays).
    outlier_bits: bits per weight of all linears to spend on those that suffer most from the recipe's few bits on these
        tokens: INT8 instead of w4g32, k-quants or INT8 instead of others.
    keep_weights: keep the float weights too, for `restore` (costs their memory).
    progress: show a bar; None shows one from 1 GB on.
    rules: overrides, asked before the recipe: {regular expression on the module name: scheme, or None
        to leave it float}, or a function (name, module) -> scheme, "float", or None for no opinion.

    With the recipe it already has, a quantized model stays as it is. Raises OptionError (unknown
    recipe or scheme, or already quantized differently) and QuantizationError (NaN or Inf, meta
    tensors); the model is unchanged then.
    """
    chosen = resolve(model, recipe, rules)
    if outlier_bits:
        chosen = _with_outliers(model, chosen, calibration, outlier_bits, recipe, rules)
    jobs, _ = plan(model, chosen)
    _refuse_changes(model, chosen)
    shards = _shards(model, jobs, keep_weights, calibration)
    found = experts.find_experts(model, chosen.scheme_for)
    _check_experts(found)
    _check_weights(jobs)
    calibrated = _calibrate(model, calibration, jobs)  # before the experts are in a form that only runs packed
    for module in found:
        experts.stack(module)
    if found:
        jobs, _ = plan(model, chosen)
    total = sum(job.weight.nbytes for job in jobs)
    hidden = total < PROGRESS_BYTES if progress is None else not progress
    queue = deque(sorted(jobs, key=lambda job: job.weight.nbytes))
    del jobs
    mapped = MappedFiles()
    with tqdm(total=total, desc="Quantizing", unit="B", unit_scale=True, disable=hidden) as bar:
        while queue:
            bar.update(_run(queue.popleft(), mapped, keep_weights, calibrated, shards))
    _scale_norms(model, calibrated.scaling.norms, keep_weights)
    if shards:
        shards.finish(model)
    _mark(model, chosen, in_parts=bool(shards))
    return model


def resolve(model: nn.Module, recipe: str | Recipe, rules: Rules | None = None) -> Recipe:
    """The recipe with the overrides; a function is asked once per module and becomes plain rules."""
    chosen = Recipe.named(recipe).fitted(model)
    if rules is None:
        return chosen
    if isinstance(rules, Mapping):
        return chosen.with_overrides(rules)
    answers: dict[str, str | None] = {}
    for name, module in _candidates(model):
        answer = rules(name, module)
        if answer is not None and answer not in (*SCHEMES, FLOAT):
            allowed = ", ".join((*SCHEMES, FLOAT))
            raise OptionError(f"rules({name!r}, ...) returned {answer!r}, allowed are {allowed}, None")
        if answer is not None:
            answers[f"^{re.escape(name)}$"] = answer
    return chosen.with_overrides(answers)


def plan(model: nn.Module, recipe: Recipe, tied: Mapping[str, str] | None = None) -> tuple[list[Job], dict[str, str]]:
    """(weights to pack, {module name: why its weight is left}). Reads nothing; works on meta too.

    A weight with several users is packed only if all of them can use it packed, with the scheme of
    the embedding among them: a tied head reads the embedding's table.
    tied: {parameter name: the one it will share}, for a model that is not tied yet.
    """
    users: dict[Any, list[tuple[str, nn.Module, nn.Parameter]]] = defaultdict(list)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None and (attribute == "weight" or parameter.dim() == 2):
                source = (tied or {}).get(f"{name}.{attribute}", "")
                users[_identity(parameters.get(source, parameter))].append((name, module, parameter))
    jobs, left = [], {}
    for group in users.values():
        if not any(isinstance(module, (nn.Linear, nn.Embedding)) for _, module, _ in group):
            continue
        scheme, reason = _decide(group, recipe)
        if any(_read_by_owner(model, name) for name, _, _ in group):
            scheme, reason = None, "its owner reads the float weight directly"
        if scheme is None:
            left.update({name: reason for name, _, _ in group})
        else:
            jobs.append(Job(group[0][2], scheme, _embedding_first(group)))
    packed = {_identity(job.weight) for job in jobs}
    if jobs and _pretrained(model) and all(_identity(parameter) in packed for parameter in parameters.values()):
        smallest = min(jobs, key=lambda job: job.weight.numel())  # OLMo: not even its norms have a weight
        jobs = [job for job in jobs if job is not smallest]
        left.update({name: "transformers needs one parameter to tell a model's dtype" for name, _ in smallest.users})
    return jobs, left


def _read_by_owner(model: nn.Module, name: str) -> bool:
    owner, _, child = name.rpartition(".")
    cls: Any = type(model.get_submodule(owner))
    return bool(name) and child in weights_read(cls)


def _with_outliers(
    model: nn.Module, chosen: Recipe, ids: Tensor | None, bits: float, recipe: str | Recipe, rules: Rules | None
) -> Recipe:
    from unicorn_backend.quantize import outliers

    found = outliers.rules(model, chosen, rules, None if ids is None else (model, ids), bits)
    return resolve(model, recipe, outliers.after(rules, found))


def _calibrate(model: nn.Module, ids: Tensor | None, jobs: list[Job]) -> Calibration:
    if ids is None:
        return Calibration()
    alone = {job.users[0][0]: job for job in jobs if len(job.users) == 1}

    def takes_part(name: str) -> bool:
        return name in alone and not on_grid(alone[name].weight.detach()[:SAMPLE], alone[name].scheme)

    return calibrate(model, ids, takes_part)


def _scale_norms(model: nn.Module, new: Mapping[str, Tensor], keep: bool) -> None:
    if keep:
        model._unicorn_norms = {name: model.get_submodule(name).weight.detach().clone() for name in new}  # type: ignore
    with torch.no_grad():
        for name, weight in new.items():
            model.get_submodule(name).weight.copy_(weight)  # type: ignore[operator]


def _shards(model: nn.Module, jobs: list[Job], keep_weights: bool, calibration: Tensor | None) -> Any:
    """How `model` is sharded over processes, None if it is not."""
    if not any(wrapped(module) for module in model.modules()):
        return None
    if calibration is not None:
        raise OptionError("calibration: got token ids, allowed is None for a model sharded over processes")
    if keep_weights:
        raise OptionError("keep_weights: got True, allowed is False for a model sharded over processes")
    from unicorn_backend.integration.tensor_parallel import Shards

    return Shards(user for job in jobs for user in job.users)


def _run(job: Job, mapped: MappedFiles, keep: bool, calibrated: Calibration, shards: Any) -> int:
    """Pack one weight, change its modules, let the float weight go. Returns the bytes of that."""
    size, storage = job.weight.nbytes, _local(job.weight).untyped_storage()
    names = [name for name, _ in job.users]
    weight = shards.whole(job.weight.detach()) if shards else job.weight.detach()
    weight = calibrated.scaling.apply(names, weight)
    packed = pack_weight(weight, job.scheme, names[0], calibrated.importance_of(names))
    del weight
    for i, (_, module) in enumerate(job.users):
        pack_module(module, shards.cut(module, packed) if shards else packed, keep=keep, owner=i == 0)
        if shards:
            shards.release(module)
    del job.weight
    mapped.release(storage)
    return size


def pack_weight(weight: Tensor, scheme: str, name: str, importance: Tensor | None = None) -> list[Tensor]:
    """`quantize_weight` with errors that name the module."""
    try:
        return quantize_weight(weight, scheme, importance)
    except ValueError as error:
        raise QuantizationError(_bad_weight(name, weight)) from error


def restore(model: nn.Module) -> nn.Module:
    """Put the float weights back that `quantize(..., keep_weights=True)` kept. Parameters stay frozen.

    Raises QuantizationError, before anything changes, if a module has none.
    """
    packed = [(name, m) for name, m in model.named_modules() if isinstance(m, (QuantLinear, QuantEmbedding))]
    if not packed:
        raise QuantizationError("restore: the model has no quantized modules")
    if missing := [name for name, m in packed if m.float_weight is None]:
        raise QuantizationError(
            f"restore: the float weight of {missing[0]!r} was not kept ({len(missing)} of {len(packed)} modules); "
            "quantize with keep_weights=True, or load the float checkpoint"
        )
    for _, module in packed:
        weight = module.float_weight
        assert weight is not None
        unpack_module(module, weight)
    for stacked in model.modules():
        if isinstance(stacked, experts.StackedExperts):
            experts.unstack(stacked)
    _scale_norms(model, model.__dict__.pop("_unicorn_norms", {}), keep=False)
    model.__dict__.pop("_unicorn_recipe", None)
    for inner in _pretrained(model):
        _hf().detach(inner)
    return model


def quantization_report(model: nn.Module) -> list[ModuleReport]:
    """One entry per Linear and Embedding, in module order."""
    recipe: Recipe | None = getattr(model, "_unicorn_recipe", None)
    left = plan(model, recipe)[1] if recipe else {}
    seen: set[int] = set()
    report = []
    for name, module in _candidates(model):
        tensors = module.packed if isinstance(module, (QuantLinear, QuantEmbedding)) else [module.weight]
        first = tensors[0].data_ptr() not in seen
        seen.add(tensors[0].data_ptr())
        report.append(_report_one(name, module, tensors, first, left.get(name, "not quantized")))
    return report


def _report_one(name: str, module: Any, tensors: list[Tensor], first: bool, reason: str) -> ModuleReport:
    weight = module.weight
    shape = (int(weight.shape[0]), int(weight.shape[-1]))
    before = weight.numel() * weight.dtype.itemsize if first else 0
    after = sum(t.nbytes for t in tensors) if first else 0
    if not isinstance(module, (QuantLinear, QuantEmbedding)):
        return ModuleReport(name, FLOAT, shape, before, after, reason=reason)
    kept = module.float_weight
    quality = None if kept is None else sqnr_db(kept.detach(), tensors)
    return ModuleReport(name, module.scheme, shape, before, after, quality, "" if first else "shares its table")


def sqnr_db(weight: Tensor, packed: list[Tensor]) -> float:
    """Signal to quantization noise of a packed weight against its float original, in dB (inf if exact)."""
    signal, noise = quantization_noise_reference(weight, packed)
    return float(10 * torch.log10(torch.tensor(signal, dtype=torch.float64) / noise))


def _candidates(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            yield name, module


def _local(weight: Any) -> Tensor:
    """What of a weight is in this process."""
    local: Tensor = weight.to_local() if hasattr(weight, "to_local") else weight
    return local


def _identity(parameter: nn.Parameter) -> Any:
    """Equal for parameters that are the same memory; meta and sharded tensors have none, there the object counts."""
    return (
        id(parameter)
        if parameter.is_meta or hasattr(parameter, "to_local")
        else (parameter.data_ptr(), parameter.shape, parameter.stride())
    )


def _decide(group: list[tuple[str, nn.Module, nn.Parameter]], recipe: Recipe) -> tuple[str | None, str]:
    """Scheme of a weight with these users, or None and the reason."""
    schemes = []
    for name, module, _ in group:
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            return None, f"shared with {name}, which cannot use it packed"
        scheme, reason = recipe.decide(name, module)
        reason = reason or refusal(module) or ""
        if scheme is None or reason:
            return None, reason if len(group) == 1 else f"{name}: {reason}"
        schemes.append((isinstance(module, nn.Embedding), scheme))
    return max(schemes, key=lambda pair: pair[0])[1], ""


def _embedding_first(group: list[tuple[str, nn.Module, nn.Parameter]]) -> list[tuple[str, nn.Module]]:
    return [(name, m) for name, m, _ in sorted(group, key=lambda user: not isinstance(user[1], nn.Embedding))]


def _refuse_changes(model: nn.Module, recipe: Recipe) -> None:
    """OptionError if a module is quantized otherwise than `recipe` says."""
    packed = [(name, m) for name, m in model.named_modules() if isinstance(m, (QuantLinear, QuantEmbedding))]
    wanted_by_table: dict[int, str] = {}
    for name, module in sorted(packed, key=lambda pair: isinstance(pair[1], nn.Linear)):  # the embedding decides
        wanted = wanted_by_table.setdefault(module.weight_packed.data_ptr(), recipe.scheme_for(name, module) or FLOAT)
        if wanted != module.scheme:
            raise OptionError(
                f"{name} is already quantized to {module.scheme}; recipe {recipe.name!r} wants {wanted}. "
                "Load the float checkpoint (or restore() if the weights were kept) to change the recipe."
            )


def _check_weights(jobs: list[Job]) -> None:
    """QuantizationError for weights that are on meta, or hold NaN or Inf."""
    ensure_kernels()
    for job in jobs:
        if job.weight.is_meta:
            raise QuantizationError(
                f"{job.users[0][0]}.weight is on the meta device (no values): load the weights before quantizing, "
                "or quantize while loading with from_pretrained(..., quantization_config=UnicornConfig())"
            )
    for job in jobs:
        weight = _local(job.weight.detach())
        if torch.ops.unicorn.count_nonfinite(weight):
            raise QuantizationError(_bad_weight(job.users[0][0], weight))


def _check_experts(found: list[nn.Module]) -> None:
    ensure_kernels()
    for module in found:
        for weight in experts.weights(module):
            if weight.is_meta or torch.ops.unicorn.count_nonfinite(weight.flatten(0, 1)):
                why = "are on the meta device" if weight.is_meta else "hold NaN or Inf"
                raise QuantizationError(f"weights of {type(module).__name__} {why}: load or repair them first")


def _bad_weight(name: str, weight: Tensor) -> str:
    bad = torch.ops.unicorn.count_nonfinite(weight)
    return (
        f"{name}.weight has {bad} NaN or Inf among {weight.numel()} values {list(weight.shape)}: the checkpoint is "
        "damaged or the model diverged. Repair the weight, or leave it float with rules={'" + name + "': None}"
    )


def _mark(model: nn.Module, recipe: Recipe, *, in_parts: bool = False) -> None:
    """Inference only; and what transformers needs in order to save the model."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.__dict__["_unicorn_recipe"] = recipe
    for inner in _pretrained(model):
        _hf().attach(inner, recipe)
        inner.hf_quantizer.in_parts = in_parts


def _pretrained(model: nn.Module) -> list[Any]:
    """The outermost transformers models in `model`, if transformers is in use at all."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:
        return []
    if isinstance(model, modeling.PreTrainedModel):
        return [model]
    return [found for child in model.children() for found in _pretrained(child)]


def _hf() -> Any:
    from unicorn_backend.integration import hf_quantizer

    return hf_quantizer
