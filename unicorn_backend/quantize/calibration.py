"""What a text tells about a model's weights: the importance of their columns, and how to scale them first.

Importance is the mean square of the activation that meets a column. The error that a linear makes is, for weight errors
without a pattern, the sum over the columns of the squared weight error times that mean square; so the searches of
scales weight the squared errors with it. llama.cpp's imatrix is the same number. For scaling see `prescale.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unicorn_backend import measure, models
from unicorn_backend.errors import OptionError, QuantizationError
from unicorn_backend.quantize.prescale import Scaling, scaling
from unicorn_backend.quantize.schemes import quantization_noise_reference, quantize_weight
from unicorn_backend.quantize.source import Source

TOKENS = 16384  # at most; of the text's begin
WINDOW = 512  # tokens per context
SMALLEST = 1e-4  # of the mean: a column that the text never used still counts a little
HEADROOM = 1_000_000_000  # bytes for activations and logits
SAMPLE = 64  # rows that tell whether a weight is on its scheme's grid


@dataclass(frozen=True)
class Calibration:
    """importance: {linear: fp32 [K] of mean 1}, of the scaled columns."""

    importance: Mapping[str, Tensor] = field(default_factory=dict)
    scaling: Scaling = field(default_factory=Scaling)

    def importance_of(self, users: Iterable[str]) -> Tensor | None:
        """That of a weight with these users (a table's is that of its tied head)."""
        return next((self.importance[name] for name in users if name in self.importance), None)


def calibrate(model: nn.Module, ids: Tensor, takes_part: Callable[[str], bool]) -> Calibration:
    """Run a float causal language model on token ids int64 [B, T].

    takes_part: whether the weight of a linear may be scaled: it gets quantized, for this linear alone.
    """
    found = importance(model, ids)
    factors = scaling(model, ids[:1], found, takes_part)
    for name, columns in factors.columns.items():
        scaled = found[name] / columns.square()
        found[name] = scaled / scaled.mean()
    return Calibration(found, factors)


def on_grid(rows: Tensor, scheme: str) -> bool:
    """Whether these rows of a weight are values of the scheme, as those of quantization-aware training are."""
    return quantization_noise_reference(rows, quantize_weight(rows, scheme))[1] == 0


def importance(model: nn.Module, ids: Tensor, window: int = WINDOW) -> dict[str, Tensor]:
    """{name of a linear: fp32 [K] of mean 1} over the tokens ids int64 [B, T], each row cut into windows.

    model: a float causal language model. Linears that no token reaches (experts) are left out.
    """
    sums: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(_adder(sums, name)))
    try:
        with torch.no_grad():
            for row in ids:
                for part in row.split(window):
                    model(input_ids=part[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: _normalised(total, name) for name, total in sums.items() if total.any()}


def model_and_ids(source: Source, kind: Any, text: str | Path) -> tuple[Any, Tensor]:
    """The model of a checkpoint in its own dtype, and token ids int64 [1, T] of the begin of a UTF-8 text file.

    kind: the transformers class of the model, which names the linears. What a GGUF file stores packed stays so.
    Raises OptionError for a text that cannot be read or is too short, and QuantizationError where the model does not
    fit into the memory.
    """
    if source.method is not None:
        raise OptionError(
            f"--calibration: {source.place} is stored with {source.method}, whose weights are kept; give its float "
            "checkpoint, or quantize without"
        )
    ids = _ids(source, text)
    needed, (_, free) = source.memory_bytes + HEADROOM, measure.ram()
    if needed > free:
        raise QuantizationError(
            f"{source.place}: --calibration runs the model, which takes {needed / 1e9:.1f} GB; {free / 1e9:.1f} GB are "
            "free. Calibrate on a machine with more memory, or quantize without"
        )
    if source.gguf is not None:
        return models.load(source.gguf), ids
    return kind.from_pretrained(source.folder, dtype="auto").eval(), ids


def _ids(source: Source, text: str | Path) -> Tensor:
    try:
        content = Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--calibration: {text} is no readable UTF-8 text: {error}") from error
    place = source.folder or source.gguf
    assert place is not None
    ids: Tensor = models.load_tokenizer(place)(content, return_tensors="pt").input_ids[:, :TOKENS]
    if ids.shape[1] < WINDOW:
        raise OptionError(f"--calibration: {text} has {ids.shape[1]} tokens; give at least {WINDOW}, better {TOKENS}")
    return ids


def _adder(sums: dict[str, Tensor], name: str) -> Any:
    def add(module: nn.Linear, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0].detach().reshape(-1, module.in_features).float()
        sums[name] = sums.get(name, torch.zeros(module.in_features, dtype=torch.float64)) + x.square().sum(0).double()

    return add


def _normalised(total: Tensor, name: str) -> Tensor:
    if not torch.isfinite(total).all():
        raise QuantizationError(f"{name}: its activations overflow on the calibration text; is the model damaged?")
    shares = (total / total.mean()).clamp_min(SMALLEST)
    return (shares / shares.mean()).float()
