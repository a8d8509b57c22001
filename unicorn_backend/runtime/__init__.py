"""Devices beside the CPU. A module of this folder with `open_device(selector)` is a device that options may name.

`open_device("vulkan")` imports `runtime/vulkan`, once per process and name, and says why where there is none.
"""

from __future__ import annotations

import importlib
import importlib.util
import threading

from unicorn_backend.runtime.device import Device

_lock = threading.RLock()
_opened: dict[str, Device | str] = {}


def open_device(name: str) -> Device | str:
    """The device that options name ("vulkan", "vulkan:1", "npu"), opened once, or why there is none."""
    kind, _, selector = name.partition(":")
    with _lock:
        if name not in _opened:
            _opened[name] = _open(kind, selector)
        return _opened[name]


def close_devices() -> None:
    """Close every device that was opened; the next `open_device` opens it anew."""
    with _lock:
        for device in _opened.values():
            if not isinstance(device, str):
                device.close()
        _opened.clear()


def _open(kind: str, selector: str) -> Device | str:
    module = f"{__name__}.{kind}"
    if importlib.util.find_spec(module) is None:
        return f"this version has no runtime for {kind}"
    found: Device | str = importlib.import_module(module).open_device(selector)
    return found
