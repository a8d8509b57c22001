"""One engine for all tests of generation: compiling the embedded model takes seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.engines import make_engine
from unicorn_backend.generation.engine import Engine


@pytest.fixture(scope="package")
def shared_engine(tiny_weights: dict[str, torch.Tensor]) -> Engine:
    return make_engine(tiny_weights)  # type: ignore[no-any-return]


@pytest.fixture
def engine(shared_engine: Engine) -> Iterator[Engine]:
    """The shared engine with nothing kept from other tests."""
    torch.set_num_threads(2)
    shared_engine.prefixes.clear()
    shared_engine.prefixes.budget_bytes = 1 << 30
    yield shared_engine


@pytest.fixture(autouse=True)
def clean_torch() -> None:
    """Here compiled graphs are kept from test to test."""
    torch.manual_seed(0)
