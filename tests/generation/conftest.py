"""One engine for all tests of generation: compiling the embedded model takes seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from unicorn_backend import models
from unicorn_backend.generation.engine import Engine

LAYERS = 3  # sliding, sliding, full: compiles in half the time of all six


@pytest.fixture(scope="package")
def shared_engine(tiny_weights: dict[str, torch.Tensor]) -> Engine:
    config = AutoConfig.from_pretrained(models.TINY, num_hidden_layers=LAYERS)
    config.layer_types = config.layer_types[:LAYERS]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(tiny_weights, strict=False)
    return Engine("tiny", model=model.eval())


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
