"""Mixtures of experts whose weights are 3-D parameters, as transformers holds them: packed like any linear.

transformers gives all such modules one form, described by attributes: `has_gate`, `is_transposed`, and so on. Each 3-D
weight becomes a linear with the experts' rows one under another (`E * N` rows), so that recipes, packing and saving
need to know nothing of experts; only the forward does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from unicorn_backend.layouts import ROWS

FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_is_expert_parallel")


class StackedExperts(nn.Module):
    """Routed experts through `unicorn::experts_linear`; x [M, H], top_k_index and top_k_weights [M, k] -> [M, H]."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        own: Any = self
        names = _names(self)
        y = self._project(hidden_states, top_k_index, names[0])
        y = own._apply_gate(y) if own.has_gate else own.act_fn(y)
        y = self._project(y, top_k_index, names[1])
        if own.has_post_expert_norm:
            y = own.post_expert_norm(y)
        return (y * top_k_weights[..., None]).sum(1).to(hidden_states.dtype)

    def _project(self, x: Tensor, experts: Tensor, name: str) -> Tensor:
        own: Any = self
        linear = own._modules[_child(name)]
        bias = own._parameters.get(f"{name}_bias")
        bias = None if bias is None else bias.reshape(-1)
        n = linear.out_features // own.num_experts
        y: Tensor = torch.ops.unicorn.experts_linear(x, experts, linear.packed, bias, n)
        return y


def find_experts(model: nn.Module, scheme_for: Callable[[str, nn.Module], str | None]) -> list[nn.Module]:
    """The experts under `model` that can be packed and have a scheme. Changes nothing."""
    found = []
    for path, module in model.named_modules():
        if is_experts(module):
            linear = nn.Linear(1, 2, bias=False, device="meta")
            if all(scheme_for(f"{path}.{_child(name)}", linear) is not None for name in _names(module)):
                found.append(module)
    return found


def stack(module: nn.Module) -> None:
    """Bring experts into the form that is packed next. Weights that are transposed are copied, others stay."""
    for name in _names(module):
        stack_weight(module, name)


def stack_weight(module: nn.Module, name: str, weight: Tensor | None = None) -> nn.Linear:
    """`stack` for one of the two weights, with another value if there is one; the second one changes the class."""
    if weight is not None:
        module._parameters[name] = nn.Parameter(weight, requires_grad=False)
    linear = _stacked(module, name)
    del module._parameters[name]
    module.add_module(_child(name), linear)
    module._is_hf_initialized = True  # type: ignore[assignment]  # else loading initialises weights it no longer has
    if all(name not in module._parameters for name in _names(module)):
        module.__class__ = _class(type(module))  # type: ignore[arg-type]
    return linear


def find_weights(
    model: nn.Module, scheme_for: Callable[[str, nn.Module], str | None]
) -> dict[str, tuple[nn.Module, str, str]]:
    """{parameter: (experts, its name there, scheme)} of the weights of `find_experts`."""
    paths = {module: path for path, module in model.named_modules()}
    linear = nn.Linear(1, 2, bias=False, device="meta")
    found = {}
    for module in find_experts(model, scheme_for):
        for name in _names(module):
            scheme = scheme_for(f"{paths[module]}.{_child(name)}", linear)
            assert scheme is not None
            found[f"{paths[module]}.{name}"] = (module, name, scheme)
    return found


def stacked_shapes(module: nn.Module) -> list[tuple[str, str, tuple[int, int]]]:
    """(parameter, linear that `stack` makes of it, that linear's shape) of both weights."""
    linears = [(name, _stacked(module, name)) for name in _names(module)]
    return [(name, _child(name), (linear.out_features, linear.in_features)) for name, linear in linears]


def is_transposed(module: nn.Module) -> bool:
    """True where the experts' weights are held as [E, K, N]."""
    return bool(vars(module)["is_transposed"])


def unstack(module: StackedExperts) -> None:
    """Inverse of `stack`, once the linears are float again."""
    own: Any = module
    for name in _names(module):
        weight = own._modules.pop(_child(name)).weight.detach().unflatten(0, (own.num_experts, -1))
        weight = weight.transpose(1, 2).contiguous() if own.is_transposed else weight
        module.register_parameter(name, nn.Parameter(weight, requires_grad=False))
    module.__class__ = type(module).__mro__[2]


def weights(module: nn.Module) -> list[Tensor]:
    """The 3-D weights of experts that were not stacked."""
    return [weight.detach() for name in _names(module) if (weight := module._parameters[name]) is not None]


def is_experts(module: nn.Module) -> bool:
    """True for a module of transformers' form whose weights can be packed, and are not yet."""
    flags = vars(module)
    if not all(flag in flags for flag in FLAGS) or flags["_is_expert_parallel"] or "forward" in flags:
        return False
    weights = [module._parameters.get(name) for name in _names(module)]
    if any(weight is None or weight.dim() != 3 or hasattr(weight, "to_local") for weight in weights):
        return False
    rows = 2 if flags["is_transposed"] else 1
    return all(weight is not None and weight.shape[rows] % ROWS == 0 for weight in weights)


def _names(module: nn.Module) -> tuple[str, str]:
    return ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"), "down_proj"


def _child(name: str) -> str:
    """Name of the linear in place of parameter `name`: another, as transformers converts tensors of the latter."""
    return name.removesuffix("_proj")


def _stacked(module: nn.Module, name: str) -> nn.Linear:
    weight: Any = module._parameters[name]
    rows = weight.detach().transpose(1, 2) if vars(module)["is_transposed"] else weight.detach()  # [E, N, K]
    linear = nn.Linear(rows.shape[2], rows.shape[0] * rows.shape[1], bias=False, device="meta")
    linear.weight = nn.Parameter(rows.reshape(-1, rows.shape[2]), requires_grad=False)
    return linear.train(module.training)


@functools.cache
def _class(cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"Stacked{cls.__name__}", (StackedExperts, cls), {"__module__": cls.__module__})
