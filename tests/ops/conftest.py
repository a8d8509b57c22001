"""Every kernel test runs on every instruction set of this CPU, on one thread and on two."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from unicorn_backend.assets import load_native

load_native()
ISAS: list[str] = torch.ops.unicorn.isas()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on one instruction set."""
    torch.ops.unicorn.set_isa(request.param)
    yield request.param
    torch.ops.unicorn.set_isa("")


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> int:
    """Runs the test on that many threads (the surrounding fixture puts the default back)."""
    torch.set_num_threads(request.param)
    return int(request.param)
