"""One opened Vulkan device: memory, pipelines, recorded command buffers, and waiting for them."""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from unicorn_backend.runtime.vulkan import pipeline_cache
from unicorn_backend.runtime.vulkan.api import (
    REQUIRE_FULL_SUBGROUPS,
    WHOLE_SIZE,
    Structs,
    VulkanError,
    call,
    extension_function,
    ffi,
    lib,
    vk,
)
from unicorn_backend.runtime.vulkan.physical import PhysicalDevice

BINDINGS = 8  # storage buffers 0..7: one layout for all shaders
SPIN_S = 100e-6  # a fence is asked for so long before the thread sleeps: sleeping costs about 60 us
PATIENCE_S = 60  # no submit takes nearly as long: the device hangs

_LOCAL, _VISIBLE, _COHERENT, _CACHED = 1, 2, 4, 8  # VK_MEMORY_PROPERTY_*
_USAGE = 0x1 | 0x2 | 0x20 | 0x100  # transfer source and destination, storage, indirect

# Memory properties by preference, for each use.
DEVICE = (_LOCAL, 0)
UPLOAD = (_LOCAL | _VISIBLE | _COHERENT, _VISIBLE | _COHERENT)
DOWNLOAD = (_VISIBLE | _COHERENT | _CACHED, _VISIBLE | _COHERENT)


@dataclass(eq=False)
class Buffer:
    handle: Any
    memory: Any
    size: int
    address: int  # where the CPU sees it; 0: it does not
    imported: bool


@dataclass(frozen=True)
class Dispatch:
    pipeline: Any
    buffers: tuple[tuple[int, Buffer], ...]  # (binding, buffer)
    grid: tuple[int, int] | int  # workgroups in x and y, or an offset into the indirect buffer
    waits: bool = True  # for what the dispatch before it writes


class Recorded:
    """A command buffer that can be submitted again and again."""

    def __init__(self, submit: Any, command: Any, pool: Any, structs: Structs) -> None:
        self.submit, self.command, self.pool, self.structs = submit, command, pool, structs


class LogicalDevice:
    """Raises VulkanError where the driver refuses. Not thread-safe: callers hold one lock per device."""

    def __init__(self, physical: PhysicalDevice, statistics: bool = False) -> None:
        self.physical = physical
        self.used = self.shared = 0
        self._made: list[Buffer] | None = None
        self._s = Structs()
        self.handle = self._create(statistics)
        self._statistics = statistics
        self._queue = self._get("vkGetDeviceQueue", "VkQueue", physical.queue_family, 0)
        self._pool = self._make(
            "vkCreateCommandPool", "VkCommandPool", "VkCommandPoolCreateInfo", queueFamilyIndex=physical.queue_family
        )
        self._set_layout, self._layout = self._layouts()
        self._pipelines: dict[Any, Any] = {}
        self._modules: dict[bytes, Any] = {}
        self._saved = 0  # pipelines that are on disk
        self._cache = self._pipeline_cache()
        self._types, self._heaps = self._memory_types()
        self._fence = ffi.new("VkFence *")

    def open_queue(self) -> None:
        """What running needs beyond compiling: RADV's null device has no fences."""
        self._fence[0] = self._make("vkCreateFence", "VkFence", "VkFenceCreateInfo")

    # ---- memory ------------------------------------------------------------------------------------------------

    def free_bytes(self) -> int:
        """Bytes still to be had over all heaps (an APU's share of memory is split among them); 0: unknown."""
        if not self.physical.features.budget:
            return max(sum(self._heaps) - self.used - self.shared, 0)
        s = Structs()
        budget = s.new("VkPhysicalDeviceMemoryBudgetPropertiesEXT")
        lib.vkGetPhysicalDeviceMemoryProperties2(
            self.physical.handle, s.new("VkPhysicalDeviceMemoryProperties2", pNext=budget)
        )
        return sum(max(int(budget.heapBudget[i]) - int(budget.heapUsage[i]), 0) for i in range(len(self._heaps)))

    def buffer(self, size: int, wanted: Sequence[int]) -> Buffer:
        """A new buffer in the first kind of memory of `wanted` that there is."""
        size = max(size, 16)
        handle = self._make("vkCreateBuffer", "VkBuffer", "VkBufferCreateInfo", size=size, usage=_USAGE)
        needs = ffi.new("VkMemoryRequirements *")
        lib.vkGetBufferMemoryRequirements(self.handle, handle, needs)
        index = self._memory_type(needs.memoryTypeBits, wanted)
        try:
            memory = self._make(
                "vkAllocateMemory",
                "VkDeviceMemory",
                "VkMemoryAllocateInfo",
                allocationSize=needs.size,
                memoryTypeIndex=index,
            )
        except VulkanError:
            lib.vkDestroyBuffer(self.handle, handle, ffi.NULL)
            raise
        call("vkBindBufferMemory", self.handle, handle, memory, 0)
        self.used += needs.size
        address = self._map(memory) if self._types[index] & _VISIBLE else 0
        return self._keep(Buffer(handle, memory, int(needs.size), address, False))

    def imported(self, address: int, size: int) -> Buffer:
        """A buffer that is the CPU's memory at `address`: whole pages, anonymous, alive until the buffer is freed."""
        alignment = self.physical.features.import_alignment
        assert alignment and address % alignment == 0, "not every driver checks this"
        size = -(-size // alignment) * alignment
        kind = vk.VK_EXTERNAL_MEMORY_HANDLE_TYPE_HOST_ALLOCATION_BIT_EXT
        s = Structs()
        external = s.new("VkExternalMemoryBufferCreateInfo", handleTypes=kind)
        handle = self._make("vkCreateBuffer", "VkBuffer", "VkBufferCreateInfo", pNext=external, size=size, usage=_USAGE)
        needs = ffi.new("VkMemoryRequirements *")
        lib.vkGetBufferMemoryRequirements(self.handle, handle, needs)
        host = s.new("VkMemoryHostPointerPropertiesEXT")
        extension_function("vkGetMemoryHostPointerPropertiesEXT", device=self.handle)(
            self.handle, kind, ffi.cast("void *", address), host
        )
        index = self._memory_type(needs.memoryTypeBits & host.memoryTypeBits, (_VISIBLE, 0))
        source = s.new("VkImportMemoryHostPointerInfoEXT", handleType=kind, pHostPointer=ffi.cast("void *", address))
        try:
            memory = self._make(
                "vkAllocateMemory",
                "VkDeviceMemory",
                "VkMemoryAllocateInfo",
                pNext=source,
                allocationSize=size,
                memoryTypeIndex=index,
            )
        except VulkanError:
            lib.vkDestroyBuffer(self.handle, handle, ffi.NULL)
            raise
        call("vkBindBufferMemory", self.handle, handle, memory, 0)
        self.shared += size
        return self._keep(Buffer(handle, memory, size, address, True))

    def staged(self, address: int, size: int) -> Buffer:
        """A copy in device memory of what the CPU has at `address`, through a buffer that both see."""
        target, staging = self.buffer(size, DEVICE), self.buffer(size, UPLOAD[1:])
        ctypes.memmove(staging.address, address, size)
        recorded = self.record_copy(staging, target, size)
        self.run(recorded)
        self.forget(recorded)
        self.free(staging)
        return target

    @contextlib.contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """If the driver refuses something inside, the buffers made inside are freed."""
        made: list[Buffer] = []
        self._made = made
        try:
            yield
        except VulkanError:
            for buffer in list(made):
                self.free(buffer)
            raise
        finally:
            self._made = None

    def _keep(self, buffer: Buffer) -> Buffer:
        if self._made is not None:
            self._made.append(buffer)
        return buffer

    def free(self, buffer: Buffer) -> None:
        if self._made is not None and buffer in self._made:
            self._made.remove(buffer)
        lib.vkDestroyBuffer(self.handle, buffer.handle, ffi.NULL)
        lib.vkFreeMemory(self.handle, buffer.memory, ffi.NULL)
        if buffer.imported:
            self.shared -= buffer.size
        else:
            self.used -= buffer.size

    def _memory_type(self, allowed: int, wanted: Sequence[int]) -> int:
        for flags in (*wanted, 0):
            for index, properties in enumerate(self._types):
                if allowed >> index & 1 and properties & flags == flags:
                    return index
        raise AssertionError("a buffer without a type of memory")  # the specification promises one

    def _map(self, memory: Any) -> int:
        address = ffi.new("void **")
        call("vkMapMemory", self.handle, memory, 0, WHOLE_SIZE, 0, address)
        return int(ffi.cast("uintptr_t", address[0]))

    def _memory_types(self) -> tuple[list[int], list[int]]:
        found = ffi.new("VkPhysicalDeviceMemoryProperties *")
        lib.vkGetPhysicalDeviceMemoryProperties(self.physical.handle, found)
        types = [int(found.memoryTypes[i].propertyFlags) for i in range(found.memoryTypeCount)]
        return types, [int(found.memoryHeaps[i].size) for i in range(found.memoryHeapCount)]

    # ---- pipelines ---------------------------------------------------------------------------------------------

    def pipeline(self, code: bytes, constants: Sequence[tuple[int, int | float]], full_subgroups: bool = False) -> Any:
        """A compute pipeline of SPIR-V `code` with specialization constants (id, value), compiled once."""
        key = (code, tuple(constants), full_subgroups)
        if key not in self._pipelines:
            self._pipelines[key] = self._compile(code, constants, full_subgroups)
        return self._pipelines[key]

    def save_pipelines(self) -> None:
        """Write the driver's compiled pipelines to disk, if there are new ones."""
        if self._saved == len(self._pipelines):
            return
        self._saved = len(self._pipelines)
        size = ffi.new("size_t *")
        call("vkGetPipelineCacheData", self.handle, self._cache, size, ffi.NULL)
        data = ffi.new("char[]", max(size[0], 1))
        call("vkGetPipelineCacheData", self.handle, self._cache, size, data)
        pipeline_cache.write(self.physical.cache_key, bytes(ffi.buffer(data, size[0])))

    def _pipeline_cache(self) -> Any:
        data = pipeline_cache.read(self.physical.cache_key)
        initial = ffi.from_buffer(data)
        return self._make(
            "vkCreatePipelineCache",
            "VkPipelineCache",
            "VkPipelineCacheCreateInfo",
            initialDataSize=len(data),
            pInitialData=initial,
        )

    def _compile(self, code: bytes, constants: Sequence[tuple[int, int | float]], full_subgroups: bool) -> Any:
        s = Structs()
        values = s.keep(ffi.new("char[]", 4 * max(len(constants), 1)))
        for i, (_, value) in enumerate(constants):
            ffi.cast("float *" if isinstance(value, float) else "uint32_t *", values)[i] = value
        entries = s.array(
            "VkSpecializationMapEntry",
            [
                s.new("VkSpecializationMapEntry", constantID=n, offset=4 * i, size=4)
                for i, (n, _) in enumerate(constants)
            ],
        )
        special = s.new(
            "VkSpecializationInfo",
            mapEntryCount=len(constants),
            pMapEntries=entries,
            dataSize=4 * len(constants),
            pData=values,
        )
        stage = s.new(
            "VkPipelineShaderStageCreateInfo",
            stage=vk.VK_SHADER_STAGE_COMPUTE_BIT,
            module=self._module(code),
            pName=s.keep(ffi.new("char[]", b"main")),
            pSpecializationInfo=special,
        )
        features = self.physical.features
        if features.size_control and features.subgroup_size == 32:
            stage.pNext = s.new("VkPipelineShaderStageRequiredSubgroupSizeCreateInfo", requiredSubgroupSize=32)
        if full_subgroups:
            stage.flags = REQUIRE_FULL_SUBGROUPS
        capture = (
            vk.VK_PIPELINE_CREATE_CAPTURE_STATISTICS_BIT_KHR
            | vk.VK_PIPELINE_CREATE_CAPTURE_INTERNAL_REPRESENTATIONS_BIT_KHR
        )
        info = s.new(
            "VkComputePipelineCreateInfo", stage=stage[0], layout=self._layout, flags=capture if self._statistics else 0
        )
        pipeline = ffi.new("VkPipeline *")
        call("vkCreateComputePipelines", self.handle, self._cache, 1, info, ffi.NULL, pipeline)
        return pipeline[0]

    def _module(self, code: bytes) -> Any:
        if code not in self._modules:
            words = ffi.cast("uint32_t *", self._s.keep(ffi.new("char[]", code)))
            self._modules[code] = self._make(
                "vkCreateShaderModule", "VkShaderModule", "VkShaderModuleCreateInfo", codeSize=len(code), pCode=words
            )
        return self._modules[code]

    def _layouts(self) -> tuple[Any, Any]:
        s = Structs()
        storage, compute = vk.VK_DESCRIPTOR_TYPE_STORAGE_BUFFER, vk.VK_SHADER_STAGE_COMPUTE_BIT
        slots = [
            s.new(
                "VkDescriptorSetLayoutBinding", binding=i, descriptorType=storage, descriptorCount=1, stageFlags=compute
            )
            for i in range(BINDINGS)
        ]
        bindings = s.array("VkDescriptorSetLayoutBinding", slots)
        sets = self._make(
            "vkCreateDescriptorSetLayout",
            "VkDescriptorSetLayout",
            "VkDescriptorSetLayoutCreateInfo",
            bindingCount=BINDINGS,
            pBindings=bindings,
        )
        layouts = s.array("VkDescriptorSetLayout", [sets])
        return sets, self._make(
            "vkCreatePipelineLayout",
            "VkPipelineLayout",
            "VkPipelineLayoutCreateInfo",
            setLayoutCount=1,
            pSetLayouts=layouts,
        )

    # ---- running -----------------------------------------------------------------------------------------------

    def record(self, dispatches: Sequence[Dispatch], indirect: Buffer | None = None, clock: Any = None) -> Recorded:
        """The dispatches one after another; those that wait see what was written before them, the CPU sees everything.

        `clock`: a pool from `new_clock` for one more timestamp than dispatches.
        """
        pool, sets = self._descriptor_sets(dispatches)

        def fill(command: Any) -> None:
            if clock is not None:
                lib.vkCmdResetQueryPool(command, clock, 0, len(dispatches) + 1)
                lib.vkCmdWriteTimestamp(command, vk.VK_PIPELINE_STAGE_TOP_OF_PIPE_BIT, clock, 0)
            for number, (dispatch, descriptors) in enumerate(zip(dispatches, sets, strict=True)):
                if number and dispatch.waits:
                    self._barrier(command, vk.VK_PIPELINE_STAGE_COMPUTE_SHADER_BIT, vk.VK_ACCESS_SHADER_READ_BIT)
                lib.vkCmdBindPipeline(command, vk.VK_PIPELINE_BIND_POINT_COMPUTE, dispatch.pipeline)
                one = ffi.new("VkDescriptorSet *", descriptors)
                lib.vkCmdBindDescriptorSets(
                    command, vk.VK_PIPELINE_BIND_POINT_COMPUTE, self._layout, 0, 1, one, 0, ffi.NULL
                )
                if isinstance(dispatch.grid, int):
                    assert indirect is not None
                    lib.vkCmdDispatchIndirect(command, indirect.handle, dispatch.grid)
                else:
                    lib.vkCmdDispatch(command, *dispatch.grid, 1)
                if clock is not None:
                    lib.vkCmdWriteTimestamp(command, vk.VK_PIPELINE_STAGE_COMPUTE_SHADER_BIT, clock, number + 1)
            self._barrier(command, vk.VK_PIPELINE_STAGE_HOST_BIT, vk.VK_ACCESS_HOST_READ_BIT)

        return self._record(fill, pool)

    def record_copy(self, source: Buffer, target: Buffer, size: int, clock: Any = None) -> Recorded:
        """`clock`: a pool from `new_clock` for one dispatch."""
        copy = ffi.new("VkBufferCopy *", {"size": size})

        def fill(command: Any) -> None:
            if clock is not None:
                lib.vkCmdResetQueryPool(command, clock, 0, 2)
                lib.vkCmdWriteTimestamp(command, vk.VK_PIPELINE_STAGE_TOP_OF_PIPE_BIT, clock, 0)
            lib.vkCmdCopyBuffer(command, source.handle, target.handle, 1, copy)
            if clock is not None:
                lib.vkCmdWriteTimestamp(command, vk.VK_PIPELINE_STAGE_TRANSFER_BIT, clock, 1)

        return self._record(fill)

    def run(self, recorded: Recorded) -> None:
        """Submit and wait. Raises as these do."""
        self.submit(recorded)
        self.wait()

    def submit(self, recorded: Recorded) -> None:
        """One at a time: `wait` before the next. Raises VulkanError: from then on the device must not be used."""
        call("vkQueueSubmit", self._queue, 1, recorded.submit, self._fence[0])

    def wait(self, spin: bool = False) -> None:
        """For what was submitted, without the GIL. Raises VulkanError and TimeoutError: the device is lost."""
        until = time.perf_counter() + SPIN_S
        while spin and time.perf_counter() < until:
            if lib.vkGetFenceStatus(self.handle, self._fence[0]) == vk.VK_SUCCESS:
                break
        code = lib.vkWaitForFences(self.handle, 1, self._fence, 1, int(PATIENCE_S * 1e9))
        if code != vk.VK_SUCCESS:
            raise (
                TimeoutError(f"no answer for {PATIENCE_S} s")
                if code == vk.VK_TIMEOUT
                else VulkanError("vkWaitForFences", code)
            )
        call("vkResetFences", self.handle, 1, self._fence)

    def new_clock(self, dispatches: int) -> Any:
        """A query pool for the times of so many dispatches."""
        kind = vk.VK_QUERY_TYPE_TIMESTAMP
        return self._make(
            "vkCreateQueryPool", "VkQueryPool", "VkQueryPoolCreateInfo", queryType=kind, queryCount=dispatches + 1
        )

    def times_us(self, clock: Any, dispatches: int) -> list[float]:
        """Of each dispatch of the recording that was run last with `clock`."""
        ticks = ffi.new("uint64_t[]", dispatches + 1)
        flags = vk.VK_QUERY_RESULT_64_BIT | vk.VK_QUERY_RESULT_WAIT_BIT
        call("vkGetQueryPoolResults", self.handle, clock, 0, dispatches + 1, 8 * (dispatches + 1), ticks, 8, flags)
        return [(ticks[i + 1] - ticks[i]) * self.physical.features.timestamp_ns / 1e3 for i in range(dispatches)]

    def forget_clock(self, clock: Any) -> None:
        lib.vkDestroyQueryPool(self.handle, clock, ffi.NULL)

    def forget(self, recorded: Recorded) -> None:
        lib.vkFreeCommandBuffers(self.handle, self._pool, 1, recorded.command)
        if recorded.pool is not None:
            lib.vkDestroyDescriptorPool(self.handle, recorded.pool, ffi.NULL)

    def _descriptor_sets(self, dispatches: Sequence[Dispatch]) -> tuple[Any, list[Any]]:
        s, count = Structs(), len(dispatches)
        size = s.new(
            "VkDescriptorPoolSize", type=vk.VK_DESCRIPTOR_TYPE_STORAGE_BUFFER, descriptorCount=BINDINGS * count
        )
        pool = self._make(
            "vkCreateDescriptorPool",
            "VkDescriptorPool",
            "VkDescriptorPoolCreateInfo",
            maxSets=count,
            poolSizeCount=1,
            pPoolSizes=size,
        )
        layouts = s.array("VkDescriptorSetLayout", [self._set_layout] * count)
        info = s.new("VkDescriptorSetAllocateInfo", descriptorPool=pool, descriptorSetCount=count, pSetLayouts=layouts)
        sets = ffi.new("VkDescriptorSet[]", count)
        call("vkAllocateDescriptorSets", self.handle, info, sets)
        writes = []
        for i, dispatch in enumerate(dispatches):
            for binding, buffer in dispatch.buffers:
                what = s.new("VkDescriptorBufferInfo", buffer=buffer.handle, range=WHOLE_SIZE)
                writes.append(
                    s.new(
                        "VkWriteDescriptorSet",
                        dstSet=sets[i],
                        dstBinding=binding,
                        descriptorCount=1,
                        descriptorType=vk.VK_DESCRIPTOR_TYPE_STORAGE_BUFFER,
                        pBufferInfo=what,
                    )
                )
        lib.vkUpdateDescriptorSets(self.handle, len(writes), s.array("VkWriteDescriptorSet", writes), 0, ffi.NULL)
        return pool, [sets[i] for i in range(count)]

    def _barrier(self, command: Any, stage: int, access: int) -> None:
        s = Structs()
        barrier = s.new("VkMemoryBarrier", srcAccessMask=vk.VK_ACCESS_SHADER_WRITE_BIT, dstAccessMask=access)
        lib.vkCmdPipelineBarrier(
            command, vk.VK_PIPELINE_STAGE_COMPUTE_SHADER_BIT, stage, 0, 1, barrier, 0, ffi.NULL, 0, ffi.NULL
        )

    def _record(self, fill: Any, pool: Any = None) -> Recorded:
        s = Structs()
        command = s.keep(ffi.new("VkCommandBuffer *"))
        call(
            "vkAllocateCommandBuffers",
            self.handle,
            s.new("VkCommandBufferAllocateInfo", commandPool=self._pool, commandBufferCount=1),
            command,
        )
        call("vkBeginCommandBuffer", command[0], s.new("VkCommandBufferBeginInfo"))
        fill(command[0])
        call("vkEndCommandBuffer", command[0])
        return Recorded(s.new("VkSubmitInfo", commandBufferCount=1, pCommandBuffers=command), command, pool, s)

    # ---- life --------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Destroy everything that this object made. Buffers and recordings must be gone."""
        lib.vkDeviceWaitIdle(self.handle)
        for pipeline in self._pipelines.values():
            lib.vkDestroyPipeline(self.handle, pipeline, ffi.NULL)
        for module in self._modules.values():
            lib.vkDestroyShaderModule(self.handle, module, ffi.NULL)
        lib.vkDestroyPipelineCache(self.handle, self._cache, ffi.NULL)
        lib.vkDestroyPipelineLayout(self.handle, self._layout, ffi.NULL)
        lib.vkDestroyDescriptorSetLayout(self.handle, self._set_layout, ffi.NULL)
        lib.vkDestroyCommandPool(self.handle, self._pool, ffi.NULL)
        lib.vkDestroyFence(self.handle, self._fence[0], ffi.NULL)
        lib.vkDestroyDevice(self.handle, ffi.NULL)

    def _create(self, statistics: bool) -> Any:
        s, physical = Structs(), self.physical
        features = []
        if physical.features.integer_dot:
            features.append(s.new("VkPhysicalDeviceShaderIntegerDotProductFeatures", shaderIntegerDotProduct=1))
        if physical.features.size_control:
            features.append(
                s.new("VkPhysicalDeviceSubgroupSizeControlFeatures", subgroupSizeControl=1, computeFullSubgroups=1)
            )
        if physical.features.matrices:
            features += [
                s.new("VkPhysicalDeviceCooperativeMatrixFeaturesKHR", cooperativeMatrix=1),
                s.new("VkPhysicalDeviceVulkanMemoryModelFeatures", vulkanMemoryModel=1),
                s.new("VkPhysicalDeviceShaderFloat16Int8Features", shaderInt8=1),
            ]
        if statistics:
            features.append(s.new("VkPhysicalDevicePipelineExecutablePropertiesFeaturesKHR", pipelineExecutableInfo=1))
        for first, second in pairwise(features):
            first.pNext = second
        extensions = [e for e in physical.extensions if statistics or e != "VK_KHR_pipeline_executable_properties"]
        queue = s.new(
            "VkDeviceQueueCreateInfo",
            queueFamilyIndex=physical.queue_family,
            queueCount=1,
            pQueuePriorities=s.array("float", [1.0]),
        )
        info = s.new(
            "VkDeviceCreateInfo",
            pNext=features[0] if features else ffi.NULL,
            queueCreateInfoCount=1,
            pQueueCreateInfos=queue,
            enabledExtensionCount=len(extensions),
            ppEnabledExtensionNames=s.strings(extensions),
        )
        device = ffi.new("VkDevice *")
        call("vkCreateDevice", physical.handle, info, ffi.NULL, device)
        return device[0]

    def _make(self, function: str, kind: str, info: str, **fields: Any) -> Any:
        """A handle of `kind` from `function(device, &info, NULL, &handle)`."""
        s, handle = Structs(), ffi.new(f"{kind} *")
        call(function, self.handle, s.new(info, **fields), ffi.NULL, handle)
        return handle[0]

    def _get(self, function: str, kind: str, *arguments: Any) -> Any:
        handle = ffi.new(f"{kind} *")
        call(function, self.handle, *arguments, handle)
        return handle[0]
