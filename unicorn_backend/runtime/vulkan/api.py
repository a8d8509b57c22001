"""The C declarations of Vulkan from the `vulkan` package, and structs that stay where they are.

Of that package only `ffi`, `lib` and the constants are used. Its struct constructors copy nested structs by value and
let the arrays inside go, so that the driver reads freed memory: here a struct is made by `ffi.new` and kept alive by
the `Structs` that made it. Importing this module raises OSError without a Vulkan loader (libvulkan.so.1).
"""

from __future__ import annotations

import functools
import re
from typing import Any

import vulkan as vk
from vulkan._vulkan import ffi, lib

WHOLE_SIZE = 0xFFFFFFFFFFFFFFFF  # vk.VK_WHOLE_SIZE is -1, which does not fit the field
REQUIRE_FULL_SUBGROUPS = 2  # VK_PIPELINE_SHADER_STAGE_CREATE_REQUIRE_FULL_SUBGROUPS_BIT, missing in the package
DEVICE_LOST = -4


__all__ = [
    "REQUIRE_FULL_SUBGROUPS",
    "WHOLE_SIZE",
    "Structs",
    "VulkanError",
    "call",
    "ffi",
    "lib",
    "several",
    "text",
    "vk",
]


class VulkanError(Exception):
    """A call that the driver refused."""

    def __init__(self, function: str, code: int) -> None:
        super().__init__(f"{function} returned {_result_name(code)}")
        self.code = code


def call(function: str, *arguments: Any) -> None:
    """`lib.<function>(*arguments)`; raises VulkanError where it returns an error. The GIL is released meanwhile."""
    code = getattr(lib, function)(*arguments)
    if code is not None and code < 0:
        raise VulkanError(function, code)


def extension_function(name: str, instance: Any = None, device: Any = None) -> Any:
    """A function that the loader does not export, or None."""
    text = ffi.new("char[]", name.encode())
    if device is not None:
        address = lib.vkGetDeviceProcAddr(device, text)
    else:
        address = lib.vkGetInstanceProcAddr(instance, text)
    return ffi.cast(f"PFN_{name}", address) if address != ffi.NULL else None


def several(function: Any, kind: str, *arguments: Any) -> list[Any]:
    """What a function of the form (..., &count, array) lists."""
    count = ffi.new("uint32_t *")
    _check(function(*arguments, count, ffi.NULL))
    array = ffi.new(f"{kind}[]", max(count[0], 1))
    if structure_type(kind) is not None:
        for i in range(count[0]):
            array[i].sType = structure_type(kind)
    _check(function(*arguments, count, array))
    found = [array[i] for i in range(count[0])]
    _owners.extend([array] if found and ffi.typeof(found[0]).kind == "struct" else [])
    return found


def _check(code: int | None) -> None:
    if code is not None and code < 0:
        raise VulkanError("listing", code)


_owners: list[Any] = []  # `several` gives parts of these arrays: a few properties, asked once per process


def text(chars: Any) -> str:
    return str(ffi.string(chars).decode(errors="replace"))


class Structs:
    """Makes structs, and keeps them and their arrays alive as long as itself."""

    def __init__(self) -> None:
        self._kept: list[Any] = []

    def new(self, kind: str, **fields: Any) -> Any:
        """A pointer to a new `kind`, its sType set."""
        struct = self.keep(ffi.new(f"{kind} *"))
        code = structure_type(kind)
        if code is not None:
            struct.sType = code
        for name, value in fields.items():
            self.keep(value)
            setattr(struct, name, value)
        return struct

    def array(self, kind: str, items: list[Any]) -> Any:
        """An array of numbers or handles, or of the structs that `items` point to."""
        self.keep(items)
        array = self.keep(ffi.new(f"{kind}[]", max(len(items), 1)))
        for i, item in enumerate(items):
            pointer = (
                isinstance(item, ffi.CData)
                and ffi.typeof(item).kind == "pointer"
                and ffi.typeof(array).item.kind == "struct"
            )
            array[i] = item[0] if pointer else item
        return array

    def strings(self, items: list[str]) -> Any:
        return self.array("char *", [self.keep(ffi.new("char[]", item.encode())) for item in items])

    def keep(self, value: Any) -> Any:
        self._kept.append(value)
        return value


@functools.cache
def structure_type(kind: str) -> int | None:
    """VkBufferCreateInfo -> VK_STRUCTURE_TYPE_BUFFER_CREATE_INFO; None for a struct that has none."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", kind.removeprefix("Vk"))
    apart = re.sub(r"([A-Za-z])(\d)(?=_|$)", r"\1_\2", words)  # PROPERTIES_2, MAINTENANCE_3_PROPERTIES; not INT8
    found = (getattr(vk, f"VK_STRUCTURE_TYPE_{name.upper()}", None) for name in (apart, words))
    return next((code for code in found if code is not None), None)


@functools.cache
def _result_name(code: int) -> str:
    names = [name for name in dir(vk) if name.startswith("VK_ERROR_") and getattr(vk, name) == code]
    return min(names, key=len, default=f"VkResult {code}")
