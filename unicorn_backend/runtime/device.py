"""What a device beside the CPU must be able to do.

Tensors stay CPU tensors. A device gets the arguments of an op of the contract (`ops.py`) and returns what the CPU's
kernel would, within the rounding of another order of float additions. Where it cannot, it returns the reason (a
`str`) with its arguments untouched, and the CPU runs the op: no exception carries that decision.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from unicorn_backend.plan import Step
from unicorn_backend.runtime.overlap import Part


@dataclass(frozen=True)
class Work:
    """A region as placement sees it: before the first call, without tensors."""

    step: Step
    constants: Mapping[str, Any]  # arguments that the graph fixes, by their names in the schema; None is one of them
    whole: bool  # every weight is a parameter as it is stored, not a row range of one


@dataclass(frozen=True)
class Memory:
    """Bytes on a device."""

    used: int  # allocated by this process
    shared: int  # of the CPU's memory that the device reads in place
    budget: int  # still to be had, by the driver's word; 0 if it says nothing


class Region(Protocol):
    """Weights on a device, ready to run: one per set of weights, whatever graph calls."""

    def run(self, arguments: Sequence[Any]) -> Any:
        """The op's result for these arguments; a `str` says why there is none. Any thread; waits without the GIL."""


class ChunkedRegion(Region, Protocol):
    """An attention on a device that has a `chunk`."""

    def parts(self, arguments: Sequence[Any], count: int) -> Iterator[Part]:
        """What `run` gives, for `count` ranges of tokens, one after another."""


class Pending(Protocol):
    """A call that a device is working on."""

    def result(self) -> Any:
        """As `Region.run`, after waiting."""


class DeferredRegion(Region, Protocol):
    """A region that can compute while the caller does something else."""

    def start(self, arguments: Sequence[Any]) -> Pending | str:
        """Begin a call without a residual; the result is fp32, not rounded. A `str` says why it did not begin."""


class Device(Protocol):
    """One device. It is opened once per process and name, and was compared with the CPU's kernels when it was."""

    name: str  # as options name it: "vulkan", "vulkan:1"
    label: str  # chip and driver, for people; says so where it is a program and not a chip
    software: bool  # a program on the CPU: only `policy="fixed"` uses it
    least: int  # tokens per call that it takes
    chunk: int  # tokens of a prompt that it attends to while the feed-forward of others runs; 0: all at once
    defers: bool  # regions of `placed.DEFERRED` are `DeferredRegion`

    def refuses(self, work: Work) -> str:
        """Why it does not take this region; "" if it does. Decides from data, without touching the device."""

    def predict(self, work: Work, tokens: int, keys: int) -> tuple[float, str] | None:
        """(us of one call with `tokens`, where the figures are from); None where no cost decides."""

    def region(self, op: str, arguments: Sequence[Any]) -> Region | str:
        """The region of these weights (`op`: "int4_ffn"); the first call uploads them and prepares.

        A region ends with its weights. A `str` says why there is none: no memory left, the device is lost.
        """

    def memory(self) -> Memory: ...

    def close(self) -> None:
        """Give everything back. Regions return a reason from then on."""
