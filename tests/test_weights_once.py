"""Weights are looked up once per `generate()` and graph, and those of the model that is called are used."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from unicorn_backend.graph.lower import Lowered
from unicorn_backend.integration import model_state

NEW = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
pytestmark = pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="written for torch 2.13")


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many inputs were bound, for each time that a graph was bound to weights."""
    seen: list[int] = []
    plain = Lowered.bind

    def bind(self: Lowered, places: Any, inputs: Any, sizes: Any = ()) -> Any:
        seen.extend([len(inputs)] if inputs else [])
        return plain(self, places, inputs, sizes)

    monkeypatch.setattr(Lowered, "bind", bind)
    yield seen


def test_once_per_graph_and_generate(two_layers: Any, bound: list[int]) -> None:
    compiled: Any = torch.compile(two_layers, backend="unicorn")
    ids = torch.randint(3, 4000, (1, 12))
    first = compiled.generate(ids, **NEW)
    bound.clear()
    assert torch.equal(compiled.generate(ids, **NEW), first)
    assert len(bound) == 2, "one prompt and one decode graph"
    assert min(bound) >= 2 * 2 * 7, "every packed weight of two layers"
    assert not model_state.thread.held, "nothing is held after it"


def test_outside_of_generate_every_time(two_layers: Any, bound: list[int]) -> None:
    compiled: Any = torch.compile(two_layers, backend="unicorn")
    ids = torch.randint(3, 4000, (1, 12))
    with torch.no_grad():
        before = compiled(ids, use_cache=False).logits
        bound.clear()
        with torch.no_grad():
            two_layers.model.norm.weight += 1
        after = compiled(ids, use_cache=False).logits
    assert len(bound) == 1 and not torch.equal(before, after)


class Layer(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(64, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + 1


def test_two_models_of_one_class_in_one_state() -> None:
    layers = [Layer(0).eval(), Layer(1).eval()]
    for layer in layers:
        layer.compile(backend="unicorn", options={"recipe": "int8"})
    x = torch.randn(1, 64)
    with torch.no_grad(), model_state.one_state():
        for layer in (*layers, *layers, *layers):
            assert torch.equal(layer(x), layer.forward(x))
        assert len(model_state.thread.held) == 2


def test_another_thread_holds_nothing() -> None:
    seen: list[Any] = []
    with model_state.one_state():
        model_state.hold("key", 1)
        thread = threading.Thread(target=lambda: seen.append(model_state.thread.held.get("key")))
        thread.start()
        thread.join()
        model_state.changed()
        seen.append(model_state.thread.held.get("key"))
    model_state.hold("key", 1)  # without a state it is not kept
    assert seen == [None, None] and not model_state.thread.held


def test_a_model_is_freed(make_tiny: Callable[[], Any]) -> None:
    model = make_tiny()
    compiled: Any = torch.compile(model, backend="unicorn")
    compiled.generate(torch.randint(3, 4000, (1, 12)), **NEW)
    weight = weakref.ref(model.model.layers[0].mlp)
    del model, compiled
    torch._dynamo.reset()
    gc.collect()
    assert weight() is None
