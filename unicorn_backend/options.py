"""The one options dataclass, and the only file that reads environment variables."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unicorn_backend.errors import OptionError

DEVICES = ("cpu", "vulkan", "npu", "null")  # null: for tests, records calls
KV = ("model", "int8")
POLICIES = ("speed", "power", "fixed")


def forced_isa() -> str:
    """UNICORN_ISA: the instruction set that the CPU kernels must use; "" leaves the choice to them."""
    return os.environ.get("UNICORN_ISA", "")


def api_key() -> str:
    """UNICORN_API_KEY: what clients of `unicorn serve` must send; "" lets everybody in."""
    return os.environ.get("UNICORN_API_KEY", "")


def cache_folder() -> Path | None:
    """UNICORN_CACHE_DIR: where compiled graphs are kept; UNICORN_CACHE=0 keeps none."""
    if os.environ.get("UNICORN_CACHE", "1").lower() in ("0", "off", "false", "no"):
        return None
    folder = os.environ.get("UNICORN_CACHE_DIR")
    if folder:
        return Path(folder)
    return _user_cache()


def npu_folder() -> Path:
    """UNICORN_NPU_KERNELS: where built NPU kernels lie; without it `npu` in the cache folder."""
    if folder := os.environ.get("UNICORN_NPU_KERNELS"):
        return Path(folder)
    cache = os.environ.get("UNICORN_CACHE_DIR")
    return Path(cache) / "npu" if cache else _user_cache() / "npu"


def npu_emulated() -> str:
    """UNICORN_NPU_EMULATE: "npu1" or "npu2" to emulate that generation ("1" is npu1), "" for hardware."""
    wanted = os.environ.get("UNICORN_NPU_EMULATE", "")
    known = {"": "", "0": "", "1": "npu1", "npu1": "npu1", "npu2": "npu2"}
    if wanted not in known:
        raise OptionError(f"environment variable UNICORN_NPU_EMULATE: got {wanted!r}, allowed are 0, 1, npu1, npu2")
    return known[wanted]


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unicorn_backend"


def vulkan_drivers_are_chosen() -> bool:
    """VK_DRIVER_FILES and VK_ICD_FILENAMES are the Vulkan loader's: whoever sets one names the drivers to use."""
    return bool(os.environ.get("VK_DRIVER_FILES") or os.environ.get("VK_ICD_FILENAMES"))


@dataclass(frozen=True)
class Options:
    """`torch.compile(model, backend="unicorn", options={...})`.

    recipe: name of a quantization recipe (`unicorn_backend.recipes()` lists them), or None: the
        `default` recipe for language models, nothing for any other module.
    devices: devices that may be used beside the CPU, which is always there. "vulkan:1", "vulkan:780M" and
        "vulkan:<UUID>" name one of several.
    policy: "speed" and "power" place by predicted times, "fixed" gives a region to the first device that takes it
        (`partition/place.py`).
    strict: raise `StrictModeError` where something would be left to plain torch with a reason.
    keep_weights: keep the original float weights, so that `unicorn_backend.restore(model)` can
        put them back (costs their memory).
    cache: keep compiled graphs on disk for the next process.
    kv: K and V of `generate()`: "model" keeps them in the model's dtype, "int8" as int8 with a scale per row
        (`Int8Cache`) where the call names no cache of its own.
    """

    recipe: str | None = None
    devices: tuple[str, ...] = ("cpu",)
    policy: str = "speed"
    strict: bool = False
    keep_weights: bool = False
    cache: bool = True
    kv: str = "model"

    def __post_init__(self) -> None:
        from unicorn_backend.quantize.recipe import recipes

        if self.recipe is not None and self.recipe not in recipes():
            raise OptionError(
                f"option 'recipe': got {self.recipe!r}, allowed are None, {', '.join(map(repr, recipes()))}"
            )
        object.__setattr__(self, "devices", (self.devices,) if isinstance(self.devices, str) else tuple(self.devices))
        if unknown := [d for d in self.devices if not isinstance(d, str) or d.partition(":")[0] not in DEVICES]:
            raise OptionError(f"option 'devices': got {unknown[0]!r}, allowed are {', '.join(DEVICES)}")
        if self.policy not in POLICIES:
            raise OptionError(f"option 'policy': got {self.policy!r}, allowed are {', '.join(POLICIES)}")
        if self.kv not in KV:
            raise OptionError(f"option 'kv': got {self.kv!r}, allowed are {', '.join(KV)}")
        for name in ("strict", "keep_weights", "cache"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"option {name!r}: got {getattr(self, name)!r}, allowed are True and False")

    @classmethod
    def parse(cls, options: Mapping[str, Any] | Options | None) -> Options:
        """Options from a `torch.compile(options=...)` dict. An unknown key raises `OptionError`."""
        if isinstance(options, Options):
            return options
        allowed = [f.name for f in dataclasses.fields(cls)]
        if unknown := [key for key in (options or {}) if key not in allowed]:
            raise OptionError(f"unknown option {unknown[0]!r} for backend 'unicorn'; allowed are {', '.join(allowed)}")
        return cls(**dict(options or {}))
