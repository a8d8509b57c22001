"""The software Vulkan drivers that tests run on, and what is missing where there is none.

Both are programs on the CPU: they show that results are right, never how fast a GPU is. `UNICORN_TEST_GPU=780M pytest
tests/runtime` runs the tests of results, memory, failures and leaks on that GPU instead: part of its name.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import pytest

from tests.scripts import ROOT, load

DRIVERS = {  # name of the device -> where its driver's description may be, and what to install
    "llvmpipe": (["/usr/share/vulkan/icd.d/lvp_icd.x86_64.json"], "apt install mesa-vulkan-drivers"),
    "SwiftShader": (
        [
            str(ROOT / "build/swiftshader/usr/lib/chromium/vk_swiftshader_icd.json"),
            "/usr/lib/chromium/vk_swiftshader_icd.json",
        ],
        "apt-get download chromium-common && dpkg -x chromium-common*.deb build/swiftshader",
    ),
}

GPU = os.environ.get("UNICORN_TEST_GPU", "")
NAMES = [GPU] if GPU else list(DRIVERS)


def description(name: str) -> str:
    """Path of a driver's description; skips the test where there is none."""
    paths, install = DRIVERS[name]
    found = next((path for path in paths if Path(path).is_file()), None)
    if found is None:
        pytest.skip(f"no {name} driver ({install})")
    return found


@functools.cache
def newer_debian() -> Any:
    """Drivers and checkers that know cooperative matrices: see there."""
    return load(ROOT / "shaders" / "newer_debian.py")


def environment(name: str) -> dict[str, str]:
    """For a process of its own that sees nothing but this driver."""
    return only(description(name))


def only(path: str) -> dict[str, str]:
    """The environment with one driver. VK_DRIVER_FILES comes before the older name, even if it is empty."""
    return {k: v for k, v in os.environ.items() if k != "VK_DRIVER_FILES"} | {"VK_ICD_FILENAMES": path}


def pin_drivers() -> None:
    """Make this process see the software drivers and no others: stray drivers break enumeration."""
    if GPU:
        return
    from unicorn_backend.runtime.vulkan import physical

    found = [path for paths, _ in DRIVERS.values() for path in paths if Path(path).is_file()]
    wanted = ":".join(found)
    if os.environ.get("VK_ICD_FILENAMES") != wanted or "VK_DRIVER_FILES" in os.environ:
        os.environ["VK_ICD_FILENAMES"] = wanted
        os.environ.pop("VK_DRIVER_FILES", None)
        physical.instance.cache_clear()  # the loader looks for drivers when an instance is made


def physical(name: str) -> Any:
    """The driver's device in this process."""
    pytest.importorskip(
        "vulkan", reason="no Python package 'vulkan' (pip install vulkan)", exc_type=(ImportError, OSError)
    )
    if not GPU:
        description(name)
    elif name != GPU:
        pytest.skip(f"of {name}, and {GPU} is tested")
    pin_drivers()
    from unicorn_backend.runtime.vulkan.physical import choose, devices

    found = choose(devices(), name)
    assert not isinstance(found, str), found
    return found
