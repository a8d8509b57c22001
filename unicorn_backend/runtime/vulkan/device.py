"""The Vulkan device as the rest of the package sees it: regions by their weights, memory, failure."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from unicorn_backend.runtime.device import Memory, Work
from unicorn_backend.runtime.vulkan import cost, ffn, linear, qkv, variants
from unicorn_backend.runtime.vulkan.api import DEVICE_LOST, VulkanError
from unicorn_backend.runtime.vulkan.kernels import Call, Kernels, Shape, Weights, can_share
from unicorn_backend.runtime.vulkan.logical import LogicalDevice, Recorded
from unicorn_backend.runtime.vulkan.physical import PhysicalDevice
from unicorn_backend.runtime.vulkan.self_test import compare_with_cpu
from unicorn_backend.table import size

log = logging.getLogger(__name__)

RESERVE = 64 << 20  # bytes of the budget that are left to the desktop
CALLS: dict[str, type[Call]] = {"int4_ffn": ffn.Call, "linear": linear.Call, "int8_qkv": qkv.Call}
# kind of a region -> the schemes that its shaders take
SCHEMES = {"ffn": ("w4g32",), "linear": linear.SCHEMES, "qkv": linear.SCHEMES}
_all: weakref.WeakSet[VulkanDevice] = weakref.WeakSet()


class VulkanDevice:
    """See `runtime/device.py`. `variant` and `placing` override what the device's features choose, for tests.

    `distrust`: why its cooperative matrices are not used.
    """

    def __init__(
        self, name: str, physical: PhysicalDevice, variant: str = "", placing: str = "", distrust: str = ""
    ) -> None:
        if distrust:
            physical = replace(physical, features=replace(physical.features, matrices=()))
        self.name, self.label, self.physical = name, physical.label, physical
        self.software, self.least, self.chunk, self.defers = physical.kind == "software", 1, 0, True
        chosen = variants.choose(physical.features)
        self.variant = next((v for v in variants.VARIANTS if v.name == variant), chosen)
        self.passed_over = distrust or chosen.passed_over(physical.features)
        self.takes = ", ".join(f"{kind} ({', '.join(schemes)})" for kind, schemes in SCHEMES.items())
        self.lost = ""  # why no region runs any more
        self._placing = placing
        self._device = LogicalDevice(physical)
        self._device.open_queue()
        self._lock = threading.Lock()
        self._regions: dict[int, VulkanRegion] = {}  # by id of the first packed weight
        self._kernels: dict[Shape, Kernels] = {}
        self._dead: list[VulkanRegion] = []
        self._pending: Pending | None = None
        _all.add(self)
        log.info("%s: %s; variants:\n%s", name, self.label, variants.explain_choice(physical.features))

    # ---- the protocol ------------------------------------------------------------------------------------------

    def refuses(self, work: Work) -> str:
        kind, schemes = work.step.kind, set(work.step.schemes)
        if kind == "attention":
            return "keys and values are in the CPU's cache: attention and its output projection stay with them"
        if kind not in SCHEMES:
            return f"no shader for {kind}"
        if not schemes <= set(SCHEMES[kind]):
            return f"weights are {', '.join(sorted(schemes))}, the shaders take {' and '.join(SCHEMES[kind])}"
        if not work.whole:
            return "its weights are row ranges of one packed weight"
        if kind == "ffn" and work.constants.get("bias") != []:
            return "no shader for a feed-forward with biases"
        return self.lost

    def predict(self, work: Work, tokens: int, keys: int) -> tuple[float, str] | None:
        rates = cost.rates(self.physical)
        return cost.microseconds(work.step, tokens, rates), rates.source

    def region(self, op: str, arguments: Sequence[Any]) -> VulkanRegion | str:
        if self.lost:
            return self.lost
        call = CALLS[op](*arguments)
        region = self._regions.get(id(call.lists[0][0]))
        if region is not None and region.fits(call):
            return region
        return call.refusal() or self._prepare(call)

    def memory(self) -> Memory:
        with self._lock:
            self._bury()
            return Memory(self._device.used, self._device.shared, self._device.free_bytes())

    def close(self) -> None:
        """Regions and buffers first; a lost device is left to the end of the process."""
        with self._lock:
            self._settle()
            lost, self.lost = self.lost, self.lost or "the device was closed"
            if lost:
                return
            for region in (*self._regions.values(), *self._dead):
                region.free()
            for kernels in self._kernels.values():
                kernels.free()
            self._regions.clear()
            self._dead.clear()
            self._kernels.clear()
            self._device.close()

    # ---- inside ------------------------------------------------------------------------------------------------

    def self_test(self) -> str:
        """Why the device must not be used: other results than the CPU's; "" if they agree."""
        found = compare_with_cpu(self)
        with self._lock:
            self._bury()
            for kernels in self._kernels.values() if not self.lost else ():
                kernels.free()
            self._kernels.clear()
        return found

    def kernels(self, shape: Shape) -> Kernels:
        if shape not in self._kernels:
            with self._device.all_or_nothing():
                self._kernels[shape] = shape.kernels(self._device, self.variant)
        return self._kernels[shape]

    def run(self, region: VulkanRegion, call: Call) -> Any:
        begun = self.start(region, call)
        return begun if isinstance(begun, str) else begun.result()

    def start(self, region: VulkanRegion, call: Call) -> Pending | str:
        with self._lock:
            self._settle()
            self._bury()
            if self.lost:
                return self.lost
            try:
                kernels = self.kernels(call.shape)
                finish = kernels.start(region.weights, lambda tokens: region.recorded(kernels, tokens), call)
                self._device.save_pipelines()
            except (VulkanError, TimeoutError) as error:
                return self._failed(error)
            self._pending = Pending(self, region, finish)
            return self._pending

    def settle(self, pending: Pending) -> None:
        """Wait for it, if nobody did yet."""
        with self._lock:
            if self._pending is pending:
                self._settle()
            elif pending.found is None:
                pending.found = self.lost  # forked or closed meanwhile

    def _settle(self) -> None:
        """Buffers and the queue are free for something else afterwards."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.found = self.lost or pending.finish()
        except (VulkanError, TimeoutError) as error:
            pending.found = self._failed(error)

    def bury(self, region: VulkanRegion) -> None:
        """The region's weights are gone. May be called from anywhere, also in the middle of a run."""
        self._dead.append(region)
        if self._lock.acquire(blocking=False):
            try:
                self._bury()
            finally:
                self._lock.release()

    def _bury(self) -> None:
        while self._dead:
            self._settle()  # it may be the one that is running
            region = self._dead.pop()
            for key, other in list(self._regions.items()):
                if other is region:
                    del self._regions[key]
            if not self.lost:
                region.free()

    def _prepare(self, call: Call) -> VulkanRegion | str:
        with self._lock:
            self._settle()
            self._bury()
            key = id(call.lists[0][0])
            if (old := self._regions.pop(key, None)) is not None:
                old.free()
            packed, shape, limit = _packed(call), call.shape, self.physical.features.max_buffer_bytes
            if isinstance(call, ffn.Call) and (largest := max(w.nbytes for w in packed)) > limit:
                return f"a weight has {size(largest)}, a buffer at most {size(limit)}"
            needed = sum(w.nbytes for w in packed) + shape.bytes * (shape not in self._kernels)
            free = self._device.free_bytes()
            if needed + RESERVE > free:
                return f"out of memory: it needs {size(needed)} and leaves {size(RESERVE)}, {size(free)} are free"
            try:
                with self._device.all_or_nothing():
                    weights = Weights(self._device, call, self._placing or self._place(packed))
            except VulkanError as error:
                return self._failed(error)
            self._regions[key] = region = VulkanRegion(self, weights, call)
            return region

    def _place(self, weights: Sequence[Tensor]) -> str:
        if self.physical.kind == "discrete":
            return "staged"
        return "shared" if can_share(weights, self.physical.features.import_alignment) else "mapped"

    def _failed(self, error: Exception) -> str:
        """The reason for this call; device loss and silence are final for the device."""
        if isinstance(error, TimeoutError) or (isinstance(error, VulkanError) and error.code == DEVICE_LOST):
            self.lost = f"the device is lost ({error})"
            return self.lost
        return str(error)


class Pending:
    """A call that was submitted."""

    def __init__(self, device: VulkanDevice, region: VulkanRegion, finish: Callable[[], Any]) -> None:
        self._device, self._region, self.finish = device, region, finish
        self.found: Any = None

    def result(self) -> Any:
        """The op's result, or why there is none; waits for it."""
        if self.found is None:
            self._device.settle(self)
        return self.found


class VulkanRegion:
    """One region with its weights on the device, and its command buffers."""

    def __init__(self, device: VulkanDevice, weights: Weights, call: Call) -> None:
        self._device, self.weights, self._call = device, weights, type(call)
        self._recorded: dict[tuple[Shape, int], Recorded] = {}
        self._tensors = [weakref.ref(t) for t in _tensors(call)]
        self._versions = [_version(t) for t in _tensors(call)]
        self._watch = weakref.finalize(call.lists[0][0], VulkanDevice.bury, device, self)
        self._watch.atexit = False

    def fits(self, call: Call) -> bool:
        """True if these are the tensors that were uploaded, unchanged."""
        tensors = _tensors(call)
        same = len(tensors) == len(self._tensors) and all(
            ref() is t for ref, t in zip(self._tensors, tensors, strict=True)
        )
        return same and self._versions == [_version(t) for t in tensors]

    def run(self, arguments: Sequence[Any]) -> Any:
        call = self._call(*arguments)
        return call.refusal() or self._device.run(self, call)

    def start(self, arguments: Sequence[Any]) -> Pending | str:
        call = ffn.Call(*arguments)._replace(unrounded=True)
        return call.refusal() or self._device.start(self, call)

    def recorded(self, kernels: Kernels, tokens: int) -> Recorded:
        key = (kernels.shape, tokens)
        if key not in self._recorded:
            self._recorded[key] = kernels.record(self.weights, tokens)
        return self._recorded[key]

    def free(self) -> None:
        self._watch.detach()
        for recorded in self._recorded.values():
            self._device._device.forget(recorded)
        self._recorded.clear()
        self.weights.free()


def _packed(call: Call) -> list[Tensor]:
    return [w for weights in call.lists for w in weights]


def _tensors(call: Call) -> list[Tensor]:
    return [*_packed(call), *call.small]


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _after_fork() -> None:
    for device in _all:
        device._pending = None
        device.lost = "this process was forked after the device was opened"
        device._lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
