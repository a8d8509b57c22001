"""The NPU as a device of `unicorn_backend.runtime`: which regions it takes, and running them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from unicorn_backend.graph.describe import OPS
from unicorn_backend.runtime.device import Memory, Work
from unicorn_backend.runtime.npu import cost
from unicorn_backend.runtime.npu.designs import IllegalDesign
from unicorn_backend.runtime.npu.engine import BUDGET_BYTES, TIMEOUT_MS, Engine, NpuEngine, Unavailable
from unicorn_backend.runtime.npu.regions import AttentionRegion, QkvRegion, refusal
from unicorn_backend.runtime.npu.xrt import Xrt
from unicorn_backend.runtime.overlap import Part

log = logging.getLogger(__name__)

_said: set[tuple[str, str]] = set()
REGIONS: dict[str, Any] = {"int8_qkv": QkvRegion, "int8_attention": AttentionRegion}
LEAST = 32  # tokens: its kernels compute 128 rows at a time, decode is left to the CPU
CHUNK = 128  # rows of one product; its attention fills 256 rows per head, so two query heads per K/V head fill a launch
LEAST_EMULATED = 2  # the emulator is there to be run, no cost decides


def target_of(name: str) -> str:
    """Generation of what XRT calls the device, "" if it is not known."""
    lower = name.lower()
    if any(mark in lower for mark in ("npu1", "phoenix", "hawk")):
        return "npu1"
    if any(mark in lower for mark in ("npu4", "npu5", "npu6", "strix", "krackan", "npu2")):
        return "npu2"
    return ""


class NpuDevice:
    """An NPU, or the emulator of one."""

    def __init__(self, xrt: Xrt, root: Path, emulated: bool = False, engine: Engine | None = None) -> None:
        self.target = target_of(xrt.name)
        self.emulated = emulated
        self.name = "npu (emulated)" if emulated else "npu"
        self.label = f"{xrt.label}{', kernels run on the CPU: nothing here is an NPU' if emulated else ''}"
        self._root, self._key = root, xrt.name
        timeout = 120 * TIMEOUT_MS if emulated else TIMEOUT_MS  # the emulator shares the CPU with everything else
        self.engine = engine or NpuEngine(xrt, root, emulated, BUDGET_BYTES, timeout, builds=emulated)
        self.rates = cost.load(root, self.target, xrt.name)
        self.software, self.least = False, LEAST_EMULATED if emulated else LEAST
        self.chunk = CHUNK
        self.defers = False
        self._lock = threading.RLock()
        self._regions: dict[tuple[Any, ...], tuple[list[StorageWeakRef], _Region]] = {}

    def refuses(self, work: Work) -> str:
        op = work.step.op.removeprefix("unicorn::")
        if op not in REGIONS:
            return f"it has kernels for {' and '.join(REGIONS)}"
        if not work.whole:
            return "its weights are row ranges of one packed weight"
        return refusal(op, dict(work.constants), work.step.schemes)

    def predict(self, work: Work, tokens: int, keys: int) -> tuple[float, str] | None:
        if self.emulated:
            return None
        return cost.microseconds(work.step, tokens, keys, self.rates), self.rates.source

    def calibrate(self, tops: Mapping[str, float]) -> None:
        """Keep what the self-tests measured on this machine, once both kernels were; never the emulator's."""
        if self.emulated or self.rates.source != cost.SOURCE or not {"gemm_i8", "attention_i8"} <= set(tops):
            return
        launch_us = self.rates.launch_us  # part of what was timed already; kept, so that short prompts stay pessimistic
        self.rates = cost.Rates(tops["gemm_i8"], tops["attention_i8"], launch_us, "measured on this machine")
        cost.store(self._root, self._key, self.rates)

    def region(self, op: str, arguments: Sequence[Any]) -> _Region:
        _, positions = OPS[getattr(torch.ops.unicorn, op).default]
        weights = [tensor for position in positions for tensor in arguments[position]]
        key = (op, *(tensor.data_ptr() for tensor in weights))
        with self._lock:
            found = self._regions.get(key)
            if found is not None and not any(ref.expired() for ref in found[0]):
                return found[1]
            self._regions = {k: v for k, v in self._regions.items() if not any(ref.expired() for ref in v[0])}
            made = _Region(self, op)
            self._regions[key] = [StorageWeakRef(t.untyped_storage()) for t in weights], made
            return made

    def memory(self) -> Memory:
        engine = self.engine
        used = engine.used_bytes if isinstance(engine, NpuEngine) else 0
        return Memory(used, used, max(BUDGET_BYTES - used, 0))

    def close(self) -> None:
        self._regions.clear()
        if isinstance(self.engine, NpuEngine):
            self.engine.close()


class _Region:
    """A region's weights on the device. Inputs outside its arithmetic run on the CPU."""

    def __init__(self, device: NpuDevice, op: str) -> None:
        self._cpu = getattr(torch.ops.unicorn, op).default
        self._device, self._op = device, op
        self._on_npu: Any = None
        self._lock = threading.Lock()

    def run(self, arguments: Sequence[Any]) -> Any:
        try:
            result = self._ready(arguments).run(arguments)
        except (Unavailable, IllegalDesign) as reason:
            return str(reason)
        return self._on_cpu(result, arguments) if isinstance(result, str) else result

    def parts(self, arguments: Sequence[Any], count: int) -> Iterator[Part]:
        """Of an attention."""
        try:
            found = self._ready(arguments).parts(arguments, count)
            if isinstance(found, str):
                found = iter([(slice(0, arguments[0].shape[2]), self._on_cpu(found, arguments))])
            yield from found
        except (Unavailable, IllegalDesign) as reason:
            yield str(reason)

    def _on_cpu(self, reason: str, arguments: Sequence[Any]) -> Any:
        """This call, not the next one: said once per reason."""
        said = (self._op, reason)
        log.log(logging.DEBUG if said in _said else logging.WARNING, "a call of %s runs on the cpu: %s", *said)
        _said.add(said)
        return self._cpu(*arguments)

    def _ready(self, arguments: Sequence[Any]) -> Any:
        with self._lock:
            if self._on_npu is None:
                self._on_npu = REGIONS[self._op](self._device.engine, self._device.target, arguments)
                if isinstance(self._device.engine, NpuEngine):
                    self._device.calibrate(self._device.engine.tops)
            return self._on_npu
