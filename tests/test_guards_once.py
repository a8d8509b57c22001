"""Guards on the model: once per `generate()`, on every call outside it, and again after the model changed itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from unicorn_backend.integration import guards_once, model_state
from unicorn_backend.integration.guards_once import OnceManager

NEW = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
pytestmark = pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="written for torch 2.13")


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry for each time that all guards of a graph were evaluated."""
    seen: list[bool] = []

    class Counted:
        def __init__(self, everything: Any) -> None:
            self._everything = everything

        def check(self, frame_locals: dict[str, Any]) -> bool:
            seen.append(bool(self._everything.check(frame_locals)))
            return seen[-1]

    plain = guards_once._Gate.__init__
    monkeypatch.setattr(guards_once._Gate, "__init__", lambda self, all_, on: plain(self, Counted(all_), on))
    return seen


def test_generate_evaluates_them_once_per_graph(two_layers: Any, evaluations: list[bool]) -> None:
    compiled = torch.compile(two_layers, backend="unicorn")
    ids = torch.randint(3, 4000, (1, 12))
    first = compiled.generate(ids, **NEW)
    evaluations.clear()
    again = compiled.generate(ids, **NEW)
    assert evaluations.count(True) == 2  # one prefill and one decode graph; eight tokens
    assert torch.equal(first, again)


def test_a_model_compiled_in_place_too(two_layers: Any, evaluations: list[bool]) -> None:
    two_layers.compile(backend="unicorn")
    ids = torch.randint(3, 4000, (1, 12))
    two_layers.generate(ids, **NEW)
    evaluations.clear()
    two_layers.generate(ids, **NEW)
    assert evaluations.count(True) == 2


def test_calls_outside_generate_evaluate_them_always(two_layers: Any, evaluations: list[bool]) -> None:
    compiled = torch.compile(two_layers, backend="unicorn")
    ids = torch.randint(3, 4000, (1, 12))
    with torch.no_grad():
        compiled(ids, use_cache=False)
        evaluations.clear()
        for _ in range(3):
            compiled(ids, use_cache=False)
    assert evaluations == [True] * 3


def test_a_change_between_two_generates_counts(two_layers: Any) -> None:
    compiled = torch.compile(two_layers, backend="unicorn", options={"recipe": "none"})
    ids = torch.randint(3, 4000, (1, 12))
    kept = compiled.generate(ids, **NEW)
    for layer in two_layers.model.layers:
        layer.mlp = nn.Identity()
    changed = compiled.generate(ids, **NEW, output_logits=True, return_dict_in_generate=True)
    with torch.no_grad():
        eager = torch._dynamo.disable(two_layers._call_impl)(ids).logits[:, -1].float()
    assert not torch.equal(kept, changed.sequences)
    assert (changed.logits[0].float() - eager).abs().max() <= eager.abs().max() / 64  # four bf16 steps of 2^-8


def test_a_graph_that_changes_the_model_makes_all_count_again(evaluations: list[bool]) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[0] == 1:
                self.calls = self.calls + 1
            return torch.relu(self.linear(x)) * (2.0 if self.calls > 2 else 1.0)

    module = Counting()
    compiled = torch.compile(module, backend="unicorn")
    one, two = torch.randn(1, 8), torch.randn(2, 8)
    with torch.no_grad(), model_state.one_state():
        for x in (two, one, two, one, two, one, two, two):
            calls = module.calls + (x.shape[0] == 1)
            want = torch.relu(module.linear(x)) * (2.0 if calls > 2 else 1.0)
            assert torch.equal(compiled(x), want), calls


def test_a_broken_graph_counts_as_changing_the_model() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.scale = nn.Linear(8, 8), 1.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x)
            torch._dynamo.graph_break()
            return y * self.scale

    made: list[bool] = []
    plain = OnceManager.__init__

    def remember(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        made.append(self.model_untouched)

    module = Broken()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnceManager, "__init__", remember)
        compiled = torch.compile(module, backend="unicorn")
        x = torch.randn(2, 8)
        with torch.no_grad(), model_state.one_state():
            assert torch.equal(compiled(x), module.linear(x))
            module.scale = 2.0
            assert torch.equal(compiled(x), module.linear(x) * 2.0)
    assert made[0] is False


def test_states_nest_and_end() -> None:
    assert model_state.current() is None
    with model_state.one_state():
        outer = model_state.current()
        with model_state.one_state():
            assert model_state.current() not in (None, outer)
        assert model_state.current() is outer
        model_state.changed()
        assert model_state.current() not in (None, outer)
    assert model_state.current() is None
