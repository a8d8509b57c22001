"""The weights of a model that suffer most from few bits, to be given more.

For a small change of one weight, the KL divergence of the model's predictions is half the mean square of how much the
change moves log p(y), with y drawn from those predictions (the Fisher information). One backward pass gives the
gradient g of log p(y) at each linear's output, the weight's quantization the error e of that output; (g . e)^2 per
token, summed, tells the weights of a model apart by what their bits cost.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unicorn_backend.errors import OptionError, QuantizationError
from unicorn_backend.layouts import dequantize, packed_bytes
from unicorn_backend.quantize import rewrite
from unicorn_backend.quantize.recipe import Recipe
from unicorn_backend.quantize.schemes import quantize_weight

# What a weight of few bits may become: with w4g32 the INT8 that every device and format has, else also k-quants.
_MORE = ("q5k", "q6k", "w8c")
UPGRADES = {"w4g32": ("w8c",), "w4n32": _MORE, "w4m32": _MORE, "q4k": _MORE, "q5k": ("q6k", "w8c")}
# Mean squares of the relative error on N(0, 1), of w8c in rows of 1024.
_ERROR = {"w4g32": 6.6e-3, "w4n32": 5.4e-3, "w4m32": 5.0e-3, "q4k": 4.9e-3, "q5k": 1.2e-3, "q6k": 2.8e-4, "w8c": 6.3e-5}
TOKENS = 2048  # at most
WINDOW = 512  # tokens of one backward pass


def rules(
    skeleton: nn.Module,
    recipe: Recipe,
    first: rewrite.Rules | None,
    run: tuple[nn.Module, Tensor] | None,
    bits: float,
) -> dict[str, str]:
    """{regular expression of a linear's name: scheme} of what `choose` finds for a model that `recipe` will quantize.

    skeleton: that model, on meta if the floats are elsewhere. first: the caller's rules, whose weights are not touched.
    run: the float model and token ids.
    """
    if not 0 < bits < 8:
        raise OptionError(f"outlier bits: got {bits}, allowed is more than 0 and less than 8 per weight")
    if run is None:
        raise OptionError("outlier bits: they are spent by what a text shows; give a calibration text, too")
    model, ids = run
    floats = {name for name, module in model.named_modules() if type(module) is nn.Linear}  # experts are none
    jobs, _ = rewrite.plan(skeleton, recipe, getattr(skeleton, "all_tied_weights_keys", None))
    alone = {job.users[0][0]: (job.users[0][1], job.scheme) for job in jobs if len(job.users) == 1}
    linears = {
        name: scheme for name, (module, scheme) in alone.items() if name in floats and not _decides(first, name, module)
    }
    if not linears:
        raise OptionError("outlier bits: the model has no float linears to choose from")
    return {f"^{re.escape(name)}$": scheme for name, scheme in choose(model, ids, linears, bits).items()}


def _decides(rules: rewrite.Rules | None, name: str, module: nn.Module) -> bool:
    if rules is None or isinstance(rules, Mapping):
        return any(re.search(pattern, name) for pattern in rules or ())
    return rules(name, module) is not None


def after(first: rewrite.Rules | None, found: Mapping[str, str]) -> rewrite.Rules:
    """The caller's rules, then these."""
    if first is None or isinstance(first, Mapping):
        return {
            **(first or {}),
            **{pattern: scheme for pattern, scheme in found.items() if pattern not in (first or {})},
        }
    asked, exact = first, {re.compile(pattern): scheme for pattern, scheme in found.items()}

    def ask(name: str, module: nn.Module) -> str | None:
        answer = asked(name, module)
        return answer or next((scheme for pattern, scheme in exact.items() if pattern.search(name)), None)

    return ask


def notes(found: Mapping[str, str]) -> tuple[str, ...]:
    """What the report says; the names are in the rules of its recipe."""
    kinds = ", ".join(f"{count} in {scheme}" for scheme, count in sorted(Counter(found.values()).items()))
    return (f"{len(found)} weights have more bits, as they suffer most on the text: {kinds}",)


def choose(model: nn.Module, ids: Tensor, schemes: Mapping[str, str], bits: float) -> dict[str, str]:
    """{linear: a scheme of more bits than its own in `schemes`}, for so many bits per weight of them all together.

    What lowers the estimated divergence most per bit goes first; a weight may go up more than once.
    model: a float causal language model. ids: int64 [B, T].
    """
    shapes: dict[str, Any] = {name: model.get_submodule(name).weight.shape for name in schemes}
    found = sensitivity(model, ids, {name: scheme for name, scheme in schemes.items() if scheme in UPGRADES})
    now = {name: schemes[name] for name in found}
    left = bits * sum(shape.numel() for shape in shapes.values())
    while True:
        best, step = 0.0, ("", "", 0)
        for name, score in found.items():
            for scheme in UPGRADES[schemes[name]]:
                n, k = shapes[name]
                cost = 8 * (packed_bytes(n, k, scheme) - packed_bytes(n, k, now[name]))
                gain = score * (_ERROR[now[name]] - _ERROR[scheme]) / _ERROR[schemes[name]]
                if 0 < cost <= left and gain / cost > best:
                    best, step = gain / cost, (name, scheme, cost)
        if best == 0:
            return {name: scheme for name, scheme in now.items() if scheme != schemes[name]}
        now[step[0]] = step[1]
        left -= step[2]


def sensitivity(model: nn.Module, ids: Tensor, schemes: Mapping[str, str]) -> dict[str, float]:
    """{linear: about the KL divergence, in nats per token, that its weight in this scheme makes}."""
    scores = dict.fromkeys(schemes, 0.0)
    windows = [part for row in ids for part in row.split(WINDOW)][: max(1, TOKENS // WINDOW)]
    with ExitStack() as hooks:
        hooks.enter_context(_only_activations(model))
        for name, scheme in schemes.items():
            hook = _scorer(scores, name, model.get_submodule(name), scheme)
            hooks.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        for part in windows:
            _backward(model, part[None])
    tokens = sum(len(part) for part in windows)
    bad = next((name for name, score in scores.items() if not score < float("inf")), None)
    if bad is not None:
        raise QuantizationError(f"{bad}: its gradient on the calibration text is NaN or Inf; is the model damaged?")
    return {name: score / (2 * tokens) for name, score in scores.items()}


@torch.enable_grad()
def _backward(model: Any, ids: Tensor) -> None:
    logits = model(input_ids=ids, use_cache=False).logits[0].float()
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=torch.Generator().manual_seed(0))
    logits.log_softmax(-1).gather(-1, drawn).sum().backward()


def _scorer(scores: dict[str, float], name: str, linear: Any, scheme: str) -> Callable[..., None]:
    def forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].detach()
        output.register_hook(lambda gradient: add(x, gradient))

    def add(x: Tensor, gradient: Tensor) -> None:
        weight = linear.weight.detach()
        error = dequantize(quantize_weight(weight, scheme), *weight.shape) - weight.float()
        moved = (x.float() @ error.t() * gradient.float()).sum(-1)
        scores[name] += float(moved.square().sum())

    return forward


@contextmanager
def _only_activations(model: Any) -> Iterator[None]:
    """Gradients flow from the token embeddings on, and to no weight."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    table = model.get_input_embeddings()
    hook = table.register_forward_hook(lambda module, inputs, output: output.detach().requires_grad_())
    try:
        yield
    finally:
        hook.remove()
        for parameter in wanted:
            parameter.requires_grad_(True)
