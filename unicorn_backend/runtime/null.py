"""A device for tests: takes every region, records what is asked of it, and computes with the CPU's kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from unicorn_backend.runtime.device import Memory, Work
from unicorn_backend.runtime.overlap import Part, ranges


class NullDevice:
    def __init__(self, selector: str) -> None:
        self.name = f"null:{selector}" if selector else "null"
        self.label = "no device: calls are recorded and run on the CPU"
        self.software, self.least, self.chunk, self.defers = False, 1, 0, True
        self.calls: list[tuple[str, ...]] = []
        self.lost = ""  # set it to a reason, and regions give it as their answer

    def refuses(self, work: Work) -> str:
        self.calls.append(("refuses", work.step.kind, work.step.where))
        return "" if work.whole else "its weights are row ranges of one packed weight"

    def predict(self, work: Work, tokens: int, keys: int) -> tuple[float, str] | None:
        return None

    def region(self, op: str, arguments: Sequence[Any]) -> _Region | str:
        return self.lost or _Region(self, op)

    def memory(self) -> Memory:
        return Memory(0, 0, 0)

    def close(self) -> None:
        self.calls.append(("close",))


class _Region:
    def __init__(self, device: NullDevice, op: str) -> None:
        self._device, self._op = device, op

    def run(self, arguments: Sequence[Any]) -> Any:
        self._device.calls.append(("run", self._op))
        return getattr(torch.ops.unicorn, self._op)(*arguments)

    def parts(self, arguments: Sequence[Any], count: int) -> Iterator[Part]:
        whole = self.run(arguments)
        yield from ((tokens, whole[:, tokens]) for tokens in ranges(whole.shape[1], count))

    def start(self, arguments: Sequence[Any]) -> _Pending | str:
        self._device.calls.append(("start", self._op))
        return self._device.lost or _Pending(self, arguments)


class _Pending:
    def __init__(self, region: _Region, arguments: Sequence[Any]) -> None:
        self._region, self._arguments = region, arguments

    def result(self) -> Any:
        x, *rest = self._arguments
        return self._region.run((x.float(), *rest))  # the result of fp32 activations is not rounded


def open_device(selector: str) -> NullDevice:
    return NullDevice(selector)
