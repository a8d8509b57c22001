"""What a model needs, and what there is: weights and KV cache in RAM, regions in the memory of devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from unicorn_backend import measure
from unicorn_backend.integration import screening
from unicorn_backend.plan import TYPICAL, Plan
from unicorn_backend.quantize.memory import left_in_files
from unicorn_backend.runtime import open_device
from unicorn_backend.table import size


@dataclass(frozen=True)
class MemoryPlan:
    """All in bytes. `devices`: name -> (weights placed there, what its driver still gives; 0 if it says nothing)."""

    weights: int
    cache: int  # keys and values at `tokens`; 0 for a model without them
    tokens: int
    ram: int
    ram_free: int
    devices: dict[str, tuple[int, int]]
    disk: int = 0  # of the weights: in their file, RAM has no room for them
    copied: int = 0  # beside the weights: high bits of a head whose rows are screened (made by the first answer)

    def __str__(self) -> str:
        lines = [
            f"memory: weights {size(self.weights)}, keys and values {size(self.cache)} at {self.tokens} tokens; "
            f"RAM {size(self.ram_free)} free of {size(self.ram)}"
        ]
        if self.copied:
            lines.append(f"  {size(self.copied)} more for the head's high bits, which rule out most of its rows")
        if self.disk:
            lines.append(
                f"  {size(self.disk)} of the weights stay in their file, as RAM is full: where not cached, they "
                "are read from the disk by every call"
            )
        if self.weights - self.disk + self.cache > self.ram:
            lines.append("  more than this machine's RAM: it will swap, or be killed; take fewer bits per weight")
        for name, (placed, budget) in self.devices.items():
            left = f", {size(budget)} left by its driver's word" if budget else ""
            lines.append(f"  {name}: {size(placed)} of weights{left}")
        return "\n".join(lines)


def plan_memory(model: Any, plans: Sequence[Plan], tokens: int = TYPICAL) -> MemoryPlan:
    """The memory of a module whose graphs have these plans."""
    total, free = measure.ram()
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    placed: dict[str, dict[str, int]] = {}
    for plan in plans:
        for step in plan.steps:
            if step.device != "cpu":  # a prompt's graph and a decode step's share their weights
                placed.setdefault(step.device, {})[f"{step.kind} {step.where}"] = step.weight_bytes
    devices = {}
    for name, regions in placed.items():
        device = open_device(name.removesuffix(" (emulated)"))
        budget = 0 if isinstance(device, str) else device.memory().budget
        devices[name] = sum(regions.values()), budget
    cache = measure.kv_bytes(model, tokens) if hasattr(text, "num_hidden_layers") else 0
    weights, disk = measure.model_bytes(model), left_in_files(getattr(model, "_orig_mod", model))
    copied = screening.saved(model).copied if hasattr(model, "get_output_embeddings") else 0
    return MemoryPlan(weights, cache, tokens, total, free, devices, disk, copied)
