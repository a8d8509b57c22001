"""The ops that a placed graph calls: `unicorn::placed_<op>`, with the op's arguments and the number of a `Site`.

Where something else can be computed meanwhile (`partition/branches.py`) it is `start_<op>`, which returns at once, and
`finish_<op>`, which waits.

They go through torch's dispatcher, so that the native program (`ops/program.cpp`) runs a placed graph as any other.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from unicorn_backend.ops import LIBRARY
from unicorn_backend.plan import Plan
from unicorn_backend.runtime import overlap
from unicorn_backend.runtime.device import ChunkedRegion, Device, Pending
from unicorn_backend.runtime.overlap import Overlap

log = logging.getLogger(__name__)

OPS = ("int4_ffn", "int8_attention", "int8_qkv", "linear")
DEFERRED = ("int4_ffn",)  # come in halves, too; their last argument is a residual

_numbers, _tickets = itertools.count(1), itertools.count(1)
_said: set[tuple[str, str]] = set()  # devices and reasons that were warned about
_sites: weakref.WeakValueDictionary[int, Site] = weakref.WeakValueDictionary()


class Site:
    """One placed call in one compiled graph; it lives as long as the graph's callable holds it.

    What it decides at run time it writes into the graph's plan, where `explain` reads it.
    """

    def __init__(self, op: str, device: Device | None, plan: Plan, index: int, least: int = 1) -> None:
        """`least`: tokens per call from which the device runs it. `device`: None is the CPU."""
        self.number = next(_numbers)
        self.op = op
        self.device = device
        self.leads: Overlap | None = None  # an attention that a feed-forward on another device follows
        self.follows: Overlap | None = None  # that feed-forward
        self._cpu: Callable[..., Any] = getattr(torch.ops.unicorn, op).default
        self._plan, self._index, self._least = plan, index, least
        self._lock = threading.Lock()
        self._under_way: dict[int, Pending] = {}
        _sites[self.number] = self

    def __call__(self, arguments: tuple[Any, ...]) -> Any:
        if self.follows is not None and (done := self.follows.finish(arguments, self._run)) is not None:
            return done
        return self._run(arguments)

    def _run(self, arguments: tuple[Any, ...]) -> Any:
        device = self._for(arguments)
        if device is not None:
            region = device.region(self.op, arguments)
            if self.leads is not None and overlap.enabled and not isinstance(region, str):
                if (count := arguments[0].shape[2] // device.chunk) > 1:
                    parts = cast(ChunkedRegion, region).parts(arguments, count)
                    return self.leads.start(arguments, parts, lambda reason: self._left(device, reason, arguments))
            result = region if isinstance(region, str) else region.run(arguments)
            return self._left(device, result, arguments) if isinstance(result, str) else result
        return self._cpu(*arguments)

    def _left(self, device: Device, reason: str, arguments: tuple[Any, ...]) -> Any:
        self._leave(device, reason)
        return self._cpu(*arguments)

    def start(self, arguments: tuple[Any, ...]) -> Tensor:
        """Begin a call, without the residual: its number, for `finish`."""
        number, device = next(_tickets), self._for(arguments)
        if device is not None and overlap.enabled:
            region: Any = device.region(self.op, arguments)
            begun = region if isinstance(region, str) else region.start(arguments)
            if isinstance(begun, str):
                self._leave(device, begun)
            else:
                self._under_way[number] = begun
        return torch.tensor(number)

    def finish(self, arguments: tuple[Any, ...], ticket: Tensor) -> Any:
        """Wait for the call, add the residual (the last argument) in fp32 and round once, as the op does."""
        device, pending = self.device, self._under_way.pop(int(ticket), None)
        if device is None or pending is None:
            return self._run(arguments)
        found = pending.result()
        if isinstance(found, str):
            return self._left(device, found, arguments)
        residual = arguments[-1]
        return (found if residual is None else found.add_(residual)).to(arguments[0].dtype)

    def _for(self, arguments: tuple[Any, ...]) -> Device | None:
        """The device, if it runs a call of this size."""
        enough = self._least <= 1 or tokens_of(self.op, arguments[0].shape) >= self._least
        return self.device if enough else None

    def _leave(self, device: Device, reason: str) -> None:
        """From now on on the CPU, said once and shown in the plan."""
        with self._lock:
            if self.device is None:
                return
            self.device = None
        step = self._plan.steps[self._index]
        self._plan.steps[self._index] = dataclasses.replace(step, device="cpu", reason=f"{device.name}: {reason}")
        # A lost device is the same reason for all its regions: one warning, not one per layer.
        level = logging.DEBUG if (device.name, reason) in _said else logging.WARNING
        _said.add((device.name, reason))
        log.log(level, "%s at %s goes back to the cpu: %s: %s", step.kind, step.where, device.name, reason)


def tokens_of(op: str, shape: Sequence[int]) -> int:
    """Tokens of a call, from the shape of the op's first argument: [B, H, T, D] for attention, else [..., K]."""
    return shape[0] * shape[2] if op == "int8_attention" else math.prod(shape[:-1])


def placed_op(op: str, form: str = "placed") -> Any:
    """The overload that stands for `op` in a placed graph; `form`: "placed", or its halves "start" and "finish"."""
    return getattr(torch.ops.unicorn, f"{form}_{op}").default


def _define(op: str) -> None:
    schema = str(getattr(torch.ops.unicorn, op).default._schema).removeprefix("unicorn::")
    arguments, _, returns = schema.partition(") -> ")
    LIBRARY.define(f"placed_{arguments}, int site) -> {returns}")
    LIBRARY.impl(f"placed_{op}", lambda *arguments: _sites[arguments[-1]](arguments[:-1]), "CPU")
    if op not in DEFERRED:
        return
    LIBRARY.define(f"start_{arguments}, int site) -> Tensor")
    LIBRARY.define(f"finish_{arguments}, Tensor ticket, int site) -> {returns}")
    LIBRARY.impl(f"start_{op}", lambda *arguments: _sites[arguments[-1]].start(arguments[:-1]), "CPU")
    LIBRARY.impl(f"finish_{op}", lambda *arguments: _sites[arguments[-1]].finish(arguments[:-2], arguments[-2]), "CPU")


for _op in OPS:
    _define(_op)
