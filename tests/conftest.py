"""Fixtures for all tests: the embedded model, fixed seeds and threads, a clean Dynamo per test.

No test uses the network.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports transformers
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["UNICORN_CACHE"] = "0"  # every test compiles; test_compile_cache.py turns it on for its processes

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

THREADS = 2

# Looking for garbage among the millions of objects of torch and its traces was a sixth of the tests' time.
gc.set_threshold(100_000, 50, 50)


@pytest.fixture(autouse=True)
def clean_torch() -> Iterator[None]:
    """Same seed, same threads and no compiled graphs at the start of every test."""
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def tiny_weights() -> dict[str, torch.Tensor]:
    """State dict of the embedded model, read once. Do not change it: load copies."""
    from unicorn_backend.models import load

    return {name: tensor.clone() for name, tensor in load().state_dict().items()}


@pytest.fixture
def make_tiny(tiny_weights: dict[str, torch.Tensor]) -> Callable[[], Any]:
    """A function that gives a fresh copy of the embedded model (bf16, evaluation mode)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from unicorn_backend.models import TINY

    def make() -> Any:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY), dtype=torch.bfloat16)
        model.load_state_dict(tiny_weights)
        return model.eval()

    return make


@pytest.fixture
def tiny(make_tiny: Callable[[], Any]) -> Any:
    """A fresh copy of the embedded model."""
    return make_tiny()


@pytest.fixture
def two_layers(make_tiny: Callable[[], Any]) -> Any:
    """A fresh copy of the embedded model cut to its first two layers."""
    model = make_tiny()
    del model.model.layers[2:]
    model.config.num_hidden_layers = 2
    return model


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The tokenizer of the embedded model."""
    from unicorn_backend.models import load_tokenizer

    return load_tokenizer()


@pytest.fixture(scope="session")
def sample_ids() -> torch.Tensor:
    """int64 [1, 512] tokens of held-out text."""
    from unicorn_backend.models import sample_ids

    return sample_ids(512)
