"""KV caches of int8 rows: what `kv="int8"` and `Int8Cache` give a compiled, an eager and a chatting model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import unicorn_backend
from tests.counting import watch
from tests.test_generate import NEW, make, prompt  # noqa: F401  (make is a fixture)
from unicorn_backend import Int8Cache, OptionError
from unicorn_backend.generation.prefix import cut, fork

OPTIONS = {"recipe": "default", "kv": "int8"}
LOGITS = {"output_logits": True, "return_dict_in_generate": True}


def close(got: Any, want: Any) -> None:
    """Logits of two ways of computing the same steps: bf16 apart, as long as the tokens are the same."""
    for step, (one, other) in enumerate(zip(got.logits, want.logits, strict=True)):
        assert float((one - other).float().abs().max()) <= 0.02 * float(other.float().abs().max()), step
        if not torch.equal(one.argmax(-1), other.argmax(-1)):
            return


@pytest.mark.parametrize("tokens", [20, 150])  # less and more than the window of 128
def test_compiled_is_eager(make: Any, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:  # noqa: F811
    model = make()
    unicorn_backend.quantize(model)
    ids = prompt(tokens)
    want = model.generate(ids, past_key_values=Int8Cache(config=model.config), **NEW, **LOGITS)
    compiled: Any = torch.compile(model, backend="unicorn", options=OPTIONS)
    with watch(monkeypatch) as ran:
        got = compiled.generate(ids, **NEW, **LOGITS)
    assert isinstance(got.past_key_values, Int8Cache)
    assert {layer.keys.dtype for layer in got.past_key_values.layers} == {torch.int8}
    assert ran.graphs == 2 and ran.calls["int8_attention"] > 0
    assert ran.calls["dequantize_rows"] == 0  # attention reads the rows themselves
    config = model.config
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    step = next(step for step in ran.plans[1].steps if step.kind == "attention")
    assert (step.kv_heads, step.key_macs) == (kv_heads, heads * 2 * width)
    assert step.key_bytes == kv_heads * 2 * (width + 4)
    close(got, want)


def test_the_rows_are_those_of_the_values(make: Any) -> None:  # noqa: F811
    model = make()
    ids = prompt(30)
    with torch.no_grad():
        plain = model(ids, use_cache=True).past_key_values
        int8 = model(ids, past_key_values=Int8Cache(config=model.config)).past_key_values
    first, other = plain.layers[0], int8.layers[0]  # of the first layer, whose input is the same
    assert torch.equal(torch.ops.unicorn.quantize_rows(first.keys), other.keys)
    assert torch.equal(torch.ops.unicorn.quantize_rows(first.values), other.values)
    assert int8.get_seq_length() == 30


def test_a_cache_that_the_call_names_is_used(make: Any) -> None:  # noqa: F811
    from transformers import DynamicCache

    compiled: Any = torch.compile(make(), backend="unicorn", options=OPTIONS)
    own = DynamicCache(config=compiled.config)
    got = compiled.generate(prompt(9), past_key_values=own, return_dict_in_generate=True, **NEW)
    assert got.past_key_values is own and own.layers[0].keys.dtype == torch.bfloat16
    static = compiled.generate(prompt(9), cache_implementation="static", return_dict_in_generate=True, **NEW)
    assert not isinstance(static.past_key_values, Int8Cache)


def test_batches_and_beams(make: Any) -> None:  # noqa: F811
    compiled: Any = torch.compile(make(), backend="unicorn", options=OPTIONS)
    ids = prompt(12, batch=2)
    alone = compiled.generate(ids[:1], **NEW, **LOGITS)
    both = compiled.generate(ids, **NEW, **LOGITS)
    for one, two in zip(alone.logits, both.logits, strict=True):
        assert float((one[0] - two[0]).float().abs().max()) <= 0.02 * float(one.float().abs().max())
        if not torch.equal(one[0].argmax(), two[0].argmax()):
            break
    assert compiled.generate(ids, num_beams=2, **NEW).shape == (2, 20)


def test_cut_and_fork(make: Any) -> None:  # noqa: F811
    model = make()
    cache = Int8Cache(config=model.config)
    cache.activate_past_recording()
    ids = prompt(40)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        twin = fork(cache)
        assert cut(twin, 10) == ""
        assert twin.get_seq_length() == 30 and cache.get_seq_length() == 40
        again = model(ids[:, 30:], past_key_values=twin).logits
        whole = model(ids, past_key_values=Int8Cache(config=model.config)).logits[:, 30:]
    assert float((again - whole).float().abs().max()) <= 0.02 * float(whole.float().abs().max())


def test_other_layers_are_refused() -> None:
    from transformers import Qwen3NextConfig

    config = Qwen3NextConfig(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
    with pytest.raises(ValueError, match=r"kv='int8': got a model with .*; only full and sliding attention"):
        Int8Cache(config=config)


def test_unknown_value() -> None:
    with pytest.raises(OptionError, match="option 'kv': got 'int4', allowed are model, int8"):
        unicorn_backend.Options(kv="int4")
