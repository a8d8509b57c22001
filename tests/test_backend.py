"""The backend on what is not a language model, on gradients, options and strictness."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import unicorn_backend
from tests.counting import watch
from unicorn_backend import OptionError


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)  # type: ignore[no-any-return]


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(6, 7, batch_first=True), nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x)[0])  # type: ignore[no-any-return]


class Branchy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        if x.sum() > 0:  # a graph break
            x = self.a(x)
        return {"y": self.b(x), "n": x.shape[0], "list": [x, 3]}


MODULES = [
    (Conv(), torch.randn(2, 3, 8, 8)),
    (Lstm(), torch.randn(2, 5, 6)),
    (nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), torch.randn(2, 5, 16)),
    (nn.MultiheadAttention(16, 4), torch.randn(3, 2, 16)),
]


@pytest.mark.parametrize(("module", "x"), MODULES, ids=lambda value: type(value).__name__)
def test_other_modules_give_exactly_their_own_result(module: nn.Module, x: torch.Tensor) -> None:
    module = module.eval()
    inputs = (x, x, x) if isinstance(module, nn.MultiheadAttention) else (x,)
    with torch.no_grad():
        want, got = module(*inputs), torch.compile(module, backend="unicorn")(*inputs)
    torch.testing.assert_close(got, want)


def test_graph_breaks_and_structured_outputs() -> None:
    module = Branchy().eval()
    with torch.no_grad():
        for x in (torch.ones(3, 4), -torch.ones(2, 4)):
            want, got = module(x), torch.compile(module, backend="unicorn")(x)
            torch.testing.assert_close(got, want)


def scalar_loop(x: torch.Tensor, n: int) -> torch.Tensor:
    for i in range(n):
        x = torch.where(x > i, x * 2, x - 1)
    return x.cumsum(0)


def in_place(x: torch.Tensor, n: int) -> torch.Tensor:
    y = x.clone()
    y[:n] += 1
    y.mul_(3)
    return y


def no_tensor_out(x: torch.Tensor, n: int) -> int:
    return x.shape[0] + n


@pytest.mark.parametrize("fn", [scalar_loop, in_place, no_tensor_out])
def test_plain_functions(fn: Callable[..., Any]) -> None:
    compiled = torch.compile(fn, backend="unicorn")
    for size in (5, 9):
        torch.testing.assert_close(compiled(torch.arange(size).float(), 2), fn(torch.arange(size).float(), 2))


def test_gradients_pass_through_unquantized(tiny: Any, sample_ids: torch.Tensor, caplog: Any) -> None:
    """Training mode and grad mode: the loss and every gradient equal eager's."""
    ids = sample_ids[:, :32]
    compiled = torch.compile(tiny, backend="unicorn")
    with caplog.at_level(logging.WARNING, "unicorn_backend"):
        loss = compiled(ids, labels=ids).loss
        loss.backward()
    got = {name: p.grad.clone() for name, p in tiny.named_parameters()}
    tiny.zero_grad()
    torch._dynamo.reset()
    want = tiny(ids, labels=ids).loss
    want.backward()
    torch.testing.assert_close(loss, want)
    for name, parameter in tiny.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, msg=name)
    assert "gradients are required" in caplog.text
    assert all(p.dtype == torch.bfloat16 for p in tiny.parameters()), "nothing was quantized"


def test_training_mode_is_not_quantized_even_without_gradients(tiny: Any, sample_ids: torch.Tensor) -> None:
    tiny.train()
    with torch.no_grad():
        torch.compile(tiny, backend="unicorn")(sample_ids[:, :8])
    assert all(p.dtype == torch.bfloat16 for p in tiny.parameters())


def test_quantized_ops_refuse_gradients(tiny: Any, sample_ids: torch.Tensor) -> None:
    unicorn_backend.quantize(tiny)
    embeddings = torch.randn(1, 4, tiny.config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    with pytest.raises(RuntimeError, match="inference only"):
        tiny(inputs_embeds=embeddings).logits.sum().backward()


def test_unknown_option_lists_the_allowed_ones() -> None:
    with pytest.raises(OptionError, match=r"'recipee'.*recipe, devices, policy, strict, keep_weights"):
        torch.compile(lambda x: x, backend="unicorn", options={"recipee": "q4"})


@pytest.mark.parametrize(
    "options", [{"recipe": "q5"}, {"devices": ["gpu"]}, {"policy": "fast"}, {"strict": 1}, {"keep_weights": "yes"}]
)
def test_bad_option_values(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="allowed are"):
        torch.compile(lambda x: x, backend="unicorn", options=options)


def test_strict_turns_reasons_into_an_error() -> None:
    class Ungated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.o, self.q = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = self.q(x).view(1, 4, 2, 16).transpose(1, 2)
            x = self.o(F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(1, 4, 32))
            return self.b(F.gelu(self.a(x)))  # type: ignore[no-any-return]

    compiled = torch.compile(Ungated().eval(), backend="unicorn", options={"strict": True, "recipe": "none"})
    with torch.no_grad(), pytest.raises(Exception, match="not gated"):
        compiled(torch.randn(1, 4, 32))


def test_strict_holds_where_nothing_is_taken() -> None:
    module = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).eval()
    compiled = torch.compile(module, backend="unicorn", options={"strict": True})
    with torch.no_grad(), pytest.raises(Exception, match="not gated"):
        compiled(torch.randn(1, 8))


def test_log_counts_graphs(tiny: Any, sample_ids: torch.Tensor, caplog: Any) -> None:
    with caplog.at_level(logging.INFO, "unicorn_backend"), torch.no_grad():
        torch.compile(tiny, backend="unicorn")(sample_ids[:, :8])
    assert "6 attention, 1 embedding, 6 ffn" in caplog.text and "MB of weights per call" in caplog.text


def test_explain_before_and_after(tiny: Any, sample_ids: torch.Tensor) -> None:
    before = unicorn_backend.explain(tiny)
    assert "bfloat16" in str(before) and all(p.dtype == torch.bfloat16 for p in tiny.parameters())
    compiled = torch.compile(tiny, backend="unicorn")
    with torch.no_grad():
        compiled(sample_ids[:, :8])
    after = unicorn_backend.explain(compiled)
    text = str(after)
    assert "w4g32" in text and "model.layers.0.mlp" in text and "unicorn::int4_ffn" in text
    assert after.plans[0].weight_bytes > 4_000_000


def test_reset_forgets(tiny: Any, sample_ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.compile(tiny, backend="unicorn")
    with watch(monkeypatch) as ran, torch.no_grad():
        compiled(sample_ids[:, :8])
        compiled(sample_ids[:, :8])
        assert ran.graphs == 1
        torch._dynamo.reset()
        compiled(sample_ids[:, :8])
        assert ran.graphs == 2
