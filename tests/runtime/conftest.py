"""Vulkan drivers, and devices opened on them, for the tests of regions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from tests.runtime import drivers


@pytest.fixture(scope="module", params=drivers.NAMES)
def physical(request: Any) -> Any:
    return drivers.physical(request.param)


@pytest.fixture(scope="module")
def devices(physical: Any) -> Iterator[Any]:
    """variant, placing, largest buffer -> an open device, once for each."""
    from unicorn_backend.runtime.vulkan.device import VulkanDevice

    opened: dict[tuple[str, str, int], Any] = {}

    def get(variant: str = "", placing: str = "", largest: int = 0) -> Any:
        key = (variant, placing, largest)
        if key not in opened:
            features = physical.features
            features = dataclasses.replace(features, max_buffer_bytes=largest or features.max_buffer_bytes)
            found = dataclasses.replace(physical, features=features)
            opened[key] = VulkanDevice("vulkan", found, variant, placing)
        return opened[key]

    yield get
    for device in opened.values():
        device.close()
