"""Counts what runs: unicorn ops by name, and graphs compiled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from unicorn_backend import backend
from unicorn_backend.plan import Plan


class _Count(TorchDispatchMode):
    def __init__(self, calls: Counter[str]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "unicorn":
            self.calls[func._schema.name.removeprefix("unicorn::")] += 1
        return func(*args, **(kwargs or {}))


class Ran:
    """What happened inside `watch`: op calls and plans of the graphs compiled."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.plans: list[Plan] = []

    @property
    def graphs(self) -> int:
        return len(self.plans)


@contextmanager
def watch(monkeypatch: Any) -> Iterator[Ran]:
    """Count graphs compiled by the backend, and calls of its compiled graphs' ops."""
    ran = Ran()
    plain = backend.finish

    def finish(normal: Any, plan: Plan, options: Any) -> Any:
        ran.plans.append(plan)
        compiled = plain(normal, plan, options)

        def run(*args: Any) -> Any:
            with _Count(ran.calls):
                return compiled(*args)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(backend, "finish", finish)
        yield ran


def forget() -> None:
    """Forget every compiled graph."""
    torch._dynamo.reset()
