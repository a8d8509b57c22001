"""Run by test_vulkan_validation.py in a process of its own, under the validation layer: `python -m ... NAME`."""

from __future__ import annotations

import sys
from typing import Any

from tests.runtime import test_vulkan_linear as linear
from tests.runtime import test_vulkan_qkv as qkv
from tests.runtime.test_vulkan_ffn import arguments, run
from unicorn_backend.runtime.vulkan import ffn, physical
from unicorn_backend.runtime.vulkan.device import VulkanDevice
from unicorn_backend.runtime.vulkan.logical import LogicalDevice


def clean(*placings: str) -> None:
    """Every kind of call: all forms, placings and types of memory, weights that come and go, an orderly end."""
    (found,) = physical.devices()
    for placing in placings:
        device = VulkanDevice("vulkan", found, placing="" if placing == "own" else placing)
        for m in (1, 2, 3, 8, 70):
            run(device, arguments(m, 96, 160, 96, own=m == 3))
        run(device, arguments(1, 50, 77, 34, dtype=ffn.torch.float32, norms=False))
        for m in (1, 3, 70):
            qkv.run(device, qkv.arguments(1, m, 50, (3, 1, 20), bias=m == 3))
            linear.run(device, linear.arguments(m, 50, 78, "w8a" if m > 1 else "w8c", bias=m == 3))
        device.close()


def wrong() -> None:
    """On purpose: a buffer of scales with four values, and dispatches with nothing between them."""
    (found,) = physical.devices()
    ffn.norm_scale = lambda w, offset, width: ffn.torch.ones(4)
    run(VulkanDevice("vulkan", found), arguments(1, 96, 160, 96))
    _barrierless: Any = lambda self, command, stage, access: None  # noqa: E731
    LogicalDevice._barrier = _barrierless  # type: ignore[method-assign]
    run(VulkanDevice("vulkan", found), arguments(1, 96, 160, 96))


if __name__ == "__main__":
    {"clean": clean, "wrong": wrong}[sys.argv[1]](*sys.argv[2:])
    print("done")
