"""The Hugging Face quantizer "unicorn": quantize while shards load, save, and load packed checkpoints.

    AutoModelForCausalLM.from_pretrained(float_dir, quantization_config=UnicornConfig("default"))
    model.save_pretrained(packed_dir)
    AutoModelForCausalLM.from_pretrained(packed_dir)      # packed tensors, mapped from the files

Imported by `autoload` while transformers imports its quantizers, so it must not import models at the
top. Written against transformers 5.24 (`quantizers/base.py`, `core_model_loading.py`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import rename_source_key
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from unicorn_backend.errors import CheckpointError, OptionError, QuantizationError
from unicorn_backend.layouts import BUFFERS, buffers_of, empty_packed
from unicorn_backend.quantize import experts, rewrite
from unicorn_backend.quantize.memory import MappedFiles
from unicorn_backend.quantize.modules import QuantEmbedding, QuantLinear, pack_module
from unicorn_backend.quantize.recipe import Recipe
from unicorn_backend.quantize.skeleton import conversions

METHOD = "unicorn"


class UnicornConfig(QuantizationConfigMixin):
    """`quantization_config` of `from_pretrained`, and of config.json in a packed checkpoint.

    recipe: a name from `unicorn_backend.recipes()`, a `Recipe`, or its dict (as in config.json).
    rules: overrides, {regular expression on the module name: scheme, or None to leave it float}.
    """

    def __init__(
        self,
        recipe: str | Mapping[str, Any] | Recipe = "default",
        rules: Mapping[str, str | None] | None = None,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise OptionError(f"UnicornConfig: unknown option {next(iter(unknown))!r}; allowed are recipe and rules")
        known = Recipe.from_dict(recipe) if isinstance(recipe, Mapping) else Recipe.named(recipe)
        self.quant_method = quant_method
        self.recipe = known.with_overrides(rules or {})

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method, "recipe": self.recipe.to_dict()}


class UnicornQuantizer(HfQuantizer):
    """Hooks of `from_pretrained` and `save_pretrained`.

    A float checkpoint: the modules stay as they are until their weight arrives; `convert` packs it and
    changes its modules, so at most one float weight is in memory. A packed checkpoint: the modules are
    changed beforehand, on meta, and their buffers are loaded like any others.
    """

    requires_calibration = False
    in_parts = False  # of a model sharded over processes

    def __init__(self, quantization_config: UnicornConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._jobs: list[rewrite.Job] = []
        self._by_name: dict[str, rewrite.Job] = {}
        self._experts: dict[str, tuple[nn.Module, str, str]] = {}
        self._error: Exception | None = None
        self._mapped: MappedFiles | None = None

    @property
    def recipe(self) -> Recipe:
        recipe: Recipe = self.quantization_config.recipe
        return recipe

    def update_device_map(self, device_map: Any) -> Any:
        """Packed models run on the CPU: "auto" and the like mean the CPU."""
        if device_map is None:
            return None
        places = device_map.values() if isinstance(device_map, Mapping) else [device_map]
        automatic = ("auto", "balanced", "balanced_low_0", "sequential", "cpu")
        if other := [place for place in places if str(place) not in automatic]:
            raise OptionError(
                f"device_map: got {other[0]!r}; a unicorn model runs on the CPU, use 'cpu', 'auto' or none"
            )
        return {"": "cpu"}

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        self.quantization_config.recipe = self.recipe.fitted(model)
        stored = check_files(checkpoint_files or []) if self.pre_quantized else {}
        renamings = conversions(model)[0]  # a Mixtral's experts are in the file under another name
        packed = {rename_source_key(name, renamings, [])[0].removesuffix(".weight_packed") for name in stored}
        for module in experts.find_experts(model, lambda name, _: self.recipe.name if name in packed else None):
            experts.stack(module)
        self._jobs, _left = rewrite.plan(model, self.recipe, getattr(model, "all_tied_weights_keys", None))
        if not self.pre_quantized:
            self._by_name = {f"{name}.weight": job for job in self._jobs for name, _ in job.users}
            self._experts = experts.find_weights(model, self.recipe.scheme_for)
            return
        for job in self._jobs:
            _pack_meta(job)
        check_stored(model, stored)
        untie(model)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        return param_name in self._by_name or param_name in self._experts

    def get_quantize_ops(self) -> UnicornQuantizer:
        return self  # the loader asks the operation for `convert` only

    def convert(
        self,
        input_dict: dict[str, Any],
        model: nn.Module | None = None,
        missing_keys: set[str] | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Called by the loader with each full float tensor; what is packed here is not returned.

        An error is kept for the end of loading: the loader would turn it into a RuntimeError without
        its type. Nothing more is packed after one.
        """
        rest: dict[str, Any] = {}
        self._mapped = self._mapped or MappedFiles()
        for key in list(input_dict):
            job = self._by_name.get(key)
            value = input_dict.pop(key)
            if job is None and key not in self._experts:
                rest[key] = value
                continue
            weight = value.pop() if isinstance(value, list) else value
            del value
            storage = weight.untyped_storage()
            done = self._place_experts(key, weight) if job is None else self._place(job, key, weight)
            del weight
            self._mapped.release(storage)
            if missing_keys is not None:
                missing_keys.difference_update(done)
            if model is not None and len(done) > 1:
                untie(model)
        return rest

    def _place_experts(self, key: str, weight: Tensor) -> list[str]:
        """Pack a 3-D weight of experts into the linear that takes its place. Returns the parameter that is done."""
        module, name, scheme = self._experts[key]
        wanted = list(module._parameters[name].shape)  # type: ignore[union-attr]
        try:
            if self._error is not None:
                raise self._error
            if list(weight.shape) != wanted:
                raise CheckpointError(f"{key}: got shape {list(weight.shape)}, the model has {wanted}")
            linear = experts.stack_weight(module, name, weight)
            pack_module(linear, rewrite.pack_weight(linear.weight.detach(), scheme, key))
        except (CheckpointError, QuantizationError) as error:
            self._error = error
        return [key]

    def _place(self, job: rewrite.Job, key: str, weight: Tensor) -> list[str]:
        """Pack `weight` into the modules of `job`; a second, different weight for a tied module unties it.

        Returns the parameters that are done.
        """
        parameters = [f"{name}.weight" for name, _ in job.users]
        name = key.removesuffix(".weight")
        done = isinstance(job.users[0][1], (QuantLinear, QuantEmbedding))
        try:
            if self._error is not None:
                raise self._error
            if weight.shape != job.weight.shape:
                raise CheckpointError(f"{key}: got shape {list(weight.shape)}, the model has {list(job.weight.shape)}")
            packed = rewrite.pack_weight(weight, job.scheme, name)
        except (CheckpointError, QuantizationError) as error:
            self._error = error
            if not done:
                _pack_meta(job)
            return parameters
        if not done:
            for i, (_, module) in enumerate(job.users):
                pack_module(module, packed, owner=i == 0)
            return parameters
        first: Any = job.users[0][1]
        if not all(map(torch.equal, packed, first.packed)):
            other: Any = dict(job.users)[name]
            other.set_packed(packed)
            job.users = [user for user in job.users if user[1] is not other]
            parameters = [f"{name}.weight" for name, _ in job.users]
        return parameters

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Packed tensors keep the dtype they have in the file."""
        target = converter.target_patterns[0] if converter.target_patterns else ""
        return None if target.endswith(BUFFERS) else super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        if self._error is not None:
            raise self._error
        for job in self._jobs:
            owner = job.users[0][1]
            if isinstance(owner, (QuantLinear, QuantEmbedding)):
                module: Any
                for _name, module in job.users[1:]:
                    module.set_packed(owner.packed, persistent=False)
        check_packed(model, loaded=self.pre_quantized)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model.__dict__["_unicorn_recipe"] = self.recipe
        self._jobs, self._by_name, self._experts, self._mapped = [], {}, {}, None
        return model

    def is_serializable(self) -> bool:
        if self.in_parts:
            raise QuantizationError(
                "a quantized model sharded over processes cannot be saved, each has a part only: "
                "quantize and save it in one process (unicorn quantize MODEL -o DIR)"
            )
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def register() -> None:
    """Add the quantizer to transformers. Idempotent."""
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(METHOD)(UnicornConfig)
        auto.register_quantizer(METHOD)(UnicornQuantizer)


def attach(model: Any, recipe: Recipe) -> None:
    """Make a transformers model that was quantized in place one that saves and reloads packed."""
    config = UnicornConfig(recipe)
    model.hf_quantizer = UnicornQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = METHOD
    model.config.quantization_config = config
    for inner in _transformers_models(model):
        inner.config._is_quantized = True
    untie(model)


def detach(model: Any) -> None:
    """Undo `attach`."""
    model.hf_quantizer.remove_quantization_config(model)
    for inner in _transformers_models(model):
        inner.config._is_quantized = False
        inner.__dict__.pop("_tied_weights_keys", None)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def untie(model: nn.Module) -> None:
    """Take packed modules out of transformers' tying: they share buffers, which nothing separates.

    Both the pattern list of the class (shadowed on the instance) and the expanded one are filtered.
    """
    names = [f"{name}.weight" for name, m in model.named_modules() if isinstance(m, (QuantLinear, QuantEmbedding))]
    for inner in _transformers_models(model):
        prefix = next(name for name, m in model.named_modules() if m is inner)
        local = [name.removeprefix(f"{prefix}.") if prefix else name for name in names]
        inner.__dict__["_tied_weights_keys"] = _without(inner._tied_weights_keys or {}, local)
        if getattr(inner, "all_tied_weights_keys", None):
            inner.all_tied_weights_keys = _without(inner.all_tied_weights_keys, local)


def _without(tied: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """The entries of target -> source (names or patterns) that touch none of `names`."""
    names = list(names)
    return {
        target: source
        for target, source in tied.items()
        if not any(re.search(f"^{pattern}", name) for pattern in (target, source) for name in names)
    }


def _transformers_models(model: nn.Module) -> Iterator[Any]:
    from transformers.modeling_utils import PreTrainedModel

    return (module for module in model.modules() if isinstance(module, PreTrainedModel))


def _pack_meta(job: rewrite.Job) -> None:
    n, k = job.weight.shape
    packed = empty_packed(n, k, job.scheme, "meta")
    for i, (_, module) in enumerate(job.users):
        pack_module(module, packed, owner=i == 0)


def check_packed(model: nn.Module, *, loaded: bool) -> None:
    """CheckpointError if a packed tensor is missing, or has another shape or dtype than its module needs."""
    for name, module in model.named_modules():
        if not isinstance(module, (QuantLinear, QuantEmbedding)):
            continue
        wanted = empty_packed(*module.weight_shape, module.scheme, "meta")
        for buffer, want in zip(buffers_of(module.scheme), wanted, strict=True):
            got = module._buffers.get(buffer)
            missing = got is None or got.is_meta
            if missing or (loaded and not getattr(got, "_is_hf_initialized", False)):
                raise CheckpointError(
                    f"{name}.{buffer} is not in the checkpoint: is a shard missing, or the model another one?"
                )
            assert got is not None
            if got.shape != want.shape or got.dtype != want.dtype:
                raise CheckpointError(
                    f"{name}.{buffer}: got {got.dtype} {list(got.shape)}, expected {want.dtype} {list(want.shape)} for "
                    f"{module.scheme} {list(module.weight_shape)}: config.json does not belong to these weights"
                )


Stored = dict[str, tuple[str, list[int]]]  # tensor name -> (safetensors dtype, shape)
_DTYPES = {"U8": torch.uint8, "I8": torch.int8, "F16": torch.float16, "F32": torch.float32}


def check_stored(model: nn.Module, stored: Stored) -> None:
    """CheckpointError for a packed tensor in the files with another dtype or shape than its module has.

    transformers would refuse too, but without a name in the error. Names that it maps on loading are
    left to it.
    """
    for name, want in model.named_buffers():
        if not name.endswith(BUFFERS) or name not in stored:
            continue
        dtype, shape = stored[name]
        if _DTYPES.get(dtype) != want.dtype or shape != list(want.shape):
            raise CheckpointError(
                f"{name}: the file has {dtype} {shape}, expected {want.dtype} {list(want.shape)}: "
                "config.json does not belong to these weights, or the file is damaged"
            )


def check_files(paths: Iterable[str]) -> Stored:
    """dtype and shape of every tensor in the safetensors files.

    CheckpointError naming the file, for one that is cut short or has a damaged header.
    """
    stored: Stored = {}
    for path in paths:
        if not str(path).endswith(".safetensors"):
            continue
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            try:
                header = json.loads(file.read(header_bytes)) if header_bytes < size else None
            except ValueError:
                header = None
        if not isinstance(header, dict):
            raise CheckpointError(
                f"{path}: damaged or cut short ({size} bytes, unreadable header): copy or download it again"
            )
        header.pop("__metadata__", None)
        stored.update({name: (entry["dtype"], entry["shape"]) for name, entry in header.items()})
        wanted = 8 + header_bytes + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if size != wanted:
            raise CheckpointError(
                f"{path}: cut short or damaged: {size} bytes, its header says {wanted}: copy or download it again"
            )
    return stored


register()
