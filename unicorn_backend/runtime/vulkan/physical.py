"""The Vulkan devices of this machine: what they are called and what they can do."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from unicorn_backend.options import vulkan_drivers_are_chosen
from unicorn_backend.runtime.vulkan.api import (
    Structs,
    VulkanError,
    call,
    extension_function,
    ffi,
    lib,
    several,
    text,
    vk,
)

API = (1, 2)  # the least version that is used
_TYPES = {0: "other", 1: "integrated", 2: "discrete", 3: "virtual", 4: "software"}
_PREFERENCE = ("discrete", "integrated", "virtual", "other", "software")
_BUFFERS, _THREADS, _SHARED_BYTES = 8, 256, 16 << 10  # what the shaders need
_EXTENSIONS = (
    "VK_EXT_external_memory_host",
    "VK_EXT_memory_budget",
    "VK_EXT_subgroup_size_control",
    "VK_KHR_cooperative_matrix",
    "VK_KHR_shader_integer_dot_product",
    "VK_KHR_pipeline_executable_properties",
)


class MatrixShape(NamedTuple):
    """Of a cooperative product [m, k] x [k, n]."""

    m: int
    n: int
    k: int


@dataclass(frozen=True)
class Features:
    """What variants are chosen by, and limits."""

    integer_dot: bool  # packed 4 x 8 bit dot product
    shuffle: bool  # subgroup shuffles in compute shaders
    subgroup_size: int  # the one that shaders are compiled for
    size_control: bool  # a pipeline may ask for a subgroup size, and for full subgroups
    matrices: tuple[MatrixShape, ...]  # int8 x int8 -> int32 that a subgroup multiplies
    threads: int  # that a workgroup may have
    shared_bytes: int  # of a workgroup
    import_alignment: int  # of host memory that the device can read in place; 0: it cannot
    max_buffer_bytes: int  # that a shader may read of one buffer, and that one allocation may have
    budget: bool  # the driver says how much memory is left
    statistics: bool  # pipelines can be asked for registers and instructions
    timestamp_ns: float  # per tick; 0: no timestamps


@dataclass(frozen=True)
class PhysicalDevice:
    handle: Any
    name: str
    driver: str
    kind: str  # one of _PREFERENCE
    uuid: str
    cache_key: str  # of compiled pipelines: device, driver and its build
    features: Features
    extensions: tuple[str, ...]  # of _EXTENSIONS
    queue_family: int
    missing: str  # what the shaders need and it does not have

    @property
    def label(self) -> str:
        software = "; a program on the CPU, not a GPU" if self.kind == "software" else ""
        return f"{self.name} ({self.driver or 'driver unknown'}{software})"


def choose(found: list[PhysicalDevice], selector: str) -> PhysicalDevice | str:
    """The device that `selector` names (index, UUID or part of the name; "" the best), or why none.

    A driver that runs on the CPU is never the answer to "", unless the environment names the drivers to use.
    """
    shown = "; ".join(f"{i}: {d.name} [{d.kind}, {d.uuid}]" for i, d in enumerate(found)) or "none"
    if selector:
        wanted = selector.lower().replace("-", "")
        fits = [found[int(selector)]] if selector.isdecimal() and int(selector) < len(found) else []
        fits = fits or [d for d in found if d.uuid.replace("-", "") == wanted or selector.lower() in d.name.lower()]
        if not fits:
            return f"no device is called {selector!r}; there are {shown}"
    else:
        fits = sorted(found, key=lambda d: _PREFERENCE.index(d.kind))
        if not fits:
            return "no device (`vulkaninfo --summary` lists them; Debian and Ubuntu: apt install mesa-vulkan-drivers)"
        if fits[0].kind == "software" and not vulkan_drivers_are_chosen():
            return (
                f"only software drivers ({shown}): slower than the CPU's own kernels; name one to use it all the same"
            )
    return f"{fits[0].name} has no {fits[0].missing}" if fits[0].missing else fits[0]


@functools.cache
def instance() -> Any:
    """The one VkInstance of this process. Raises VulkanError."""
    s = Structs()
    version = vk.VK_MAKE_VERSION(1, 3, 0)
    name = s.keep(ffi.new("char[]", b"unicorn_backend"))
    application = s.new("VkApplicationInfo", pApplicationName=name, pEngineName=name, apiVersion=version)
    handle = ffi.new("VkInstance *")
    call("vkCreateInstance", s.new("VkInstanceCreateInfo", pApplicationInfo=application), ffi.NULL, handle)
    return handle[0]


def devices() -> list[PhysicalDevice]:
    """All devices, in the loader's order, which VK_ICD_FILENAMES and VK_DRIVER_FILES decide. Raises VulkanError."""
    try:
        handles = several(lib.vkEnumeratePhysicalDevices, "VkPhysicalDevice", instance())
    except VulkanError as error:
        if error.code == vk.VK_ERROR_INCOMPATIBLE_DRIVER:
            return []
        raise
    return [_describe(handle) for handle in handles]


def _describe(handle: Any) -> PhysicalDevice:
    s = Structs()
    available = {
        text(e.extensionName)
        for e in several(lib.vkEnumerateDeviceExtensionProperties, "VkExtensionProperties", handle, ffi.NULL)
    }
    ids, driver = s.new("VkPhysicalDeviceIDProperties"), s.new("VkPhysicalDeviceDriverProperties")
    subgroup, allocation = s.new("VkPhysicalDeviceSubgroupProperties"), s.new("VkPhysicalDeviceMaintenance3Properties")
    chain = [ids, driver, subgroup, allocation]
    imports, sizes = (
        s.new("VkPhysicalDeviceExternalMemoryHostPropertiesEXT"),
        s.new("VkPhysicalDeviceSubgroupSizeControlProperties"),
    )
    chain += [imports] * ("VK_EXT_external_memory_host" in available) + [sizes] * (
        "VK_EXT_subgroup_size_control" in available
    )
    properties = s.new("VkPhysicalDeviceProperties2", pNext=_chained(chain))
    lib.vkGetPhysicalDeviceProperties2(handle, properties)
    own, limits = properties.properties, properties.properties.limits
    control, dot = (
        s.new("VkPhysicalDeviceSubgroupSizeControlFeatures"),
        s.new("VkPhysicalDeviceShaderIntegerDotProductFeatures"),
    )
    chain = [control] * ("VK_EXT_subgroup_size_control" in available) + [dot] * (
        "VK_KHR_shader_integer_dot_product" in available
    )
    lib.vkGetPhysicalDeviceFeatures2(handle, s.new("VkPhysicalDeviceFeatures2", pNext=_chained(chain)))
    families = several(lib.vkGetPhysicalDeviceQueueFamilyProperties, "VkQueueFamilyProperties", handle)
    queue = _queue_family([f.queueFlags for f in families])
    can_size = bool(control.subgroupSizeControl and control.computeFullSubgroups)
    shuffles = vk.VK_SUBGROUP_FEATURE_BASIC_BIT | vk.VK_SUBGROUP_FEATURE_SHUFFLE_BIT
    features = Features(
        integer_dot=bool(dot.shaderIntegerDotProduct),
        shuffle=bool(subgroup.supportedStages & vk.VK_SHADER_STAGE_COMPUTE_BIT)
        and subgroup.supportedOperations & shuffles == shuffles,
        subgroup_size=_subgroup_size(subgroup.subgroupSize, sizes if can_size else None),
        size_control=can_size,
        matrices=_matrices(handle) if "VK_KHR_cooperative_matrix" in available else (),
        threads=int(limits.maxComputeWorkGroupInvocations),
        shared_bytes=int(limits.maxComputeSharedMemorySize),
        import_alignment=int(imports.minImportedHostPointerAlignment),
        max_buffer_bytes=min(int(limits.maxStorageBufferRange), int(allocation.maxMemoryAllocationSize)),
        budget="VK_EXT_memory_budget" in available,
        statistics="VK_KHR_pipeline_executable_properties" in available,
        timestamp_ns=float(limits.timestampPeriod) if queue is not None and families[queue].timestampValidBits else 0.0,
    )
    uuid, driver_uuid, cache_uuid = (bytes(b).hex() for b in (ids.deviceUUID, ids.driverUUID, own.pipelineCacheUUID))
    return PhysicalDevice(
        handle,
        text(own.deviceName),
        " ".join(filter(None, (text(driver.driverName), text(driver.driverInfo)))),
        _TYPES.get(own.deviceType, "other"),
        f"{uuid[:8]}-{uuid[8:12]}-{uuid[12:16]}-{uuid[16:20]}-{uuid[20:]}",
        f"{driver_uuid}-{uuid}-{cache_uuid}",
        features,
        tuple(e for e in _EXTENSIONS if e in available),
        queue or 0,
        _missing(own.apiVersion, limits, queue),
    )


def _matrices(handle: Any) -> tuple[MatrixShape, ...]:
    """Shapes of int8 with exact int32 sums, where everything else is there that a shader with matrices declares."""
    s = Structs()
    matrix, order, bytes_ = (
        s.new("VkPhysicalDeviceCooperativeMatrixFeaturesKHR"),
        s.new("VkPhysicalDeviceVulkanMemoryModelFeatures"),
        s.new("VkPhysicalDeviceShaderFloat16Int8Features"),
    )
    chain = _chained([matrix, order, bytes_])
    lib.vkGetPhysicalDeviceFeatures2(handle, s.new("VkPhysicalDeviceFeatures2", pNext=chain))
    if not (matrix.cooperativeMatrix and order.vulkanMemoryModel and bytes_.shaderInt8):
        return ()
    function = extension_function("vkGetPhysicalDeviceCooperativeMatrixPropertiesKHR", instance())
    sint8, sint32 = vk.VK_COMPONENT_TYPE_SINT8_KHR, vk.VK_COMPONENT_TYPE_SINT32_KHR
    return tuple(
        MatrixShape(p.MSize, p.NSize, p.KSize)
        for p in several(function, "VkCooperativeMatrixPropertiesKHR", handle)
        if (p.AType, p.BType, p.CType, p.ResultType) == (sint8, sint8, sint32, sint32)
        and p.scope == vk.VK_SCOPE_SUBGROUP_KHR
        and not p.saturatingAccumulation
    )


def _chained(structs: list[Any]) -> Any:
    for first, second in pairwise(structs):
        first.pNext = second
    return structs[0] if structs else ffi.NULL


def _queue_family(flags: list[int]) -> int | None:
    """Compute without graphics where there is one: it does not wait for the desktop's frames."""
    compute = [i for i, f in enumerate(flags) if f & vk.VK_QUEUE_COMPUTE_BIT]
    alone = [i for i in compute if not flags[i] & vk.VK_QUEUE_GRAPHICS_BIT]
    return next(iter(alone or compute), None)


def _subgroup_size(default: int, sizes: Any) -> int:
    """32 where the device lets us choose it: RDNA runs these shaders with fewer registers per wave than with 64."""
    if sizes is not None and sizes.minSubgroupSize <= 32 <= sizes.maxSubgroupSize:
        return 32
    return int(default)


def _missing(version: int, limits: Any, queue: int | None) -> str:
    if version < vk.VK_MAKE_VERSION(*API, 0):
        return f"Vulkan {API[0]}.{API[1]}"
    if queue is None:
        return "compute queue"
    if limits.maxPerStageDescriptorStorageBuffers < _BUFFERS:
        return f"{_BUFFERS} storage buffers per shader"
    if min(limits.maxComputeWorkGroupInvocations, limits.maxComputeWorkGroupSize[0]) < _THREADS:
        return f"workgroups of {_THREADS} threads"
    return f"{_SHARED_BYTES} bytes of shared memory" if limits.maxComputeSharedMemorySize < _SHARED_BYTES else ""
