"""Vulkan: feed-forward regions and INT8 linears as compute shaders (`shaders/`), on any driver of Vulkan 1.2.

Threads: one call at a time per device, the others wait. A forked child must not use its parent's device: regions
say so and the CPU takes over. Weights are known by their tensors; the norms' weights are copied when a region is
prepared, and everything is prepared anew when a tensor was written to in place.
"""

from __future__ import annotations

import importlib.util
import logging

from unicorn_backend.runtime.device import Device

log = logging.getLogger(__name__)


def open_device(selector: str) -> Device | str:
    """The Vulkan device that `selector` names (see `physical.choose`), or why there is none."""
    if importlib.util.find_spec("vulkan") is None:
        return "the Python package is missing (pip install 'unicorn-backend[vulkan]')"
    try:
        from unicorn_backend.runtime.vulkan import api
    except OSError as error:  # how that package says that there is no loader
        return f"no Vulkan loader (Debian and Ubuntu: apt install libvulkan1 mesa-vulkan-drivers): {error}"
    from unicorn_backend.runtime.vulkan import physical
    from unicorn_backend.runtime.vulkan.device import VulkanDevice

    name = f"vulkan:{selector}" if selector else "vulkan"
    try:
        chosen = physical.choose(physical.devices(), selector)
        if isinstance(chosen, str):
            return chosen
        device = VulkanDevice(name, chosen)
        trouble = device.self_test()
        if trouble and device.variant.matrix:  # young code in every driver: the device may be good without it
            log.warning("%s: cooperative matrices are not used: %s", name, trouble)
            device.close()
            device = VulkanDevice(name, chosen, distrust=trouble)
            trouble = device.self_test()
    except api.VulkanError as error:
        return f"the driver refused: {error}"
    if trouble:
        device.close()
        return trouble
    return device
