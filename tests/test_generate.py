"""The drop-in calls on a stock model: compiled graphs really run, few of them, with the right tokens.

The model is the embedded one cut to 3 layers (sliding, sliding, full; window 128), which compiles in
about a second. With recipe "none" tokens must equal eager bf16's wherever eager's own choice is not a
tie within bf16 rounding; quantized logits are compared with the reference ops in test_reference.py.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import pytest
import torch

from tests.counting import Ran, watch

LAYERS = 3
NONE = {"recipe": "none"}
NEW = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
# bf16 logits of magnitude up to 32 have a spacing of 2^-3 / 2; two roundings apart is a tie
TIE = 0.25


@pytest.fixture
def make(tiny_weights: dict[str, torch.Tensor]) -> Callable[[], Any]:
    from transformers import AutoConfig, AutoModelForCausalLM

    from unicorn_backend.models import TINY

    def build() -> Any:
        config = AutoConfig.from_pretrained(TINY, num_hidden_layers=LAYERS)
        config.layer_types = config.layer_types[:LAYERS]
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.load_state_dict(tiny_weights, strict=False)
        return model.eval()

    return build


def prompt(tokens: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 4000, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


def assert_same_tokens(got: torch.Tensor, model: Any, **kwargs: Any) -> None:
    """`got` [B, L] equals greedy decoding of `model` up to the first tie of the top two logits."""
    with torch.no_grad():
        want = model.generate(**kwargs, output_logits=True, return_dict_in_generate=True)
    start = kwargs["inputs"].shape[1]
    checked = 0
    for row in range(got.shape[0]):
        for step, logits in enumerate(want.logits):
            top = logits[row].float().topk(2).values
            checked += 1
            if got[row, start + step] != want.sequences[row, start + step]:
                assert top[0] - top[1] <= TIE, (row, step, top)
                break
    assert checked > 0


def decoded_with(ran: Ran, layers: int = LAYERS) -> None:
    """Every layer of every forward ran as three fused ops, and nothing else did its work."""
    forwards = ran.calls["int4_ffn"] // layers
    assert forwards > 0
    for op in ("int8_qkv", "int8_attention", "int4_ffn"):
        assert ran.calls[op] == forwards * layers


def test_torch_compile_then_generate_runs_compiled(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.compile(make(), backend="unicorn", options=NONE)
    with watch(monkeypatch) as ran:
        tokens = compiled.generate(prompt(10), **NEW)
    decoded_with(ran)
    assert ran.calls["int4_ffn"] == LAYERS * 8, "one prefill and seven decode steps"
    assert_same_tokens(tokens, make(), inputs=prompt(10), **NEW)


def by_module_compile(model: Any) -> Callable[..., Any]:
    model.compile(backend="unicorn", options=NONE)
    return model.generate  # type: ignore[no-any-return]


def by_forward(model: Any) -> Callable[..., Any]:
    model.forward = torch.compile(model.forward, backend="unicorn", options=NONE)
    return model.generate  # type: ignore[no-any-return]


def by_fullgraph(model: Any) -> Callable[..., Any]:
    return torch.compile(model, backend="unicorn", options=NONE, fullgraph=True).generate  # type: ignore[no-any-return]


def by_compile_config(model: Any) -> Callable[..., Any]:
    from transformers import CompileConfig

    config = CompileConfig(backend="unicorn", options=NONE, fullgraph=False, mode=None)
    config._compile_all_devices = True  # transformers skips CompileConfig on the CPU otherwise

    def generate(*args: Any, **kwargs: Any) -> Any:
        return model.generate(*args, cache_implementation="static", compile_config=config, **kwargs)

    return generate


@pytest.mark.parametrize("route", [by_module_compile, by_forward, by_fullgraph, by_compile_config])
def test_every_way_to_compile(
    route: Callable[[Any], Callable[..., Any]], make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with watch(monkeypatch) as ran:
        tokens = route(make())(prompt(10), **NEW)
    decoded_with(ran)
    assert_same_tokens(tokens, make(), inputs=prompt(10), **NEW)


@pytest.mark.parametrize("cache", [None, "static"])
def test_two_graphs_serve_every_length(
    cache: str | None, make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short and long prompts, below, across and beyond the sliding window of 128."""
    compiled, eager = torch.compile(make(), backend="unicorn", options=NONE), make()
    kind = {"cache_implementation": cache} if cache else {}
    with watch(monkeypatch) as ran:
        for tokens, new in ((10, 4), (17, 4), (120, 20), (200, 4), (127, 3), (128, 3)):
            arguments = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, **kind}
            got = compiled.generate(prompt(tokens), **arguments)
            assert_same_tokens(got, eager, inputs=prompt(tokens), **arguments)
    assert ran.graphs == 2, [plan.summary() for plan in ran.plans]


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("kind", ["batch", "padded", "beams", "sampling"])
def test_batches_beams_and_sampling(
    kind: str, cache: str | None, make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = prompt(12, batch=1 if kind == "beams" else 3)
    arguments: dict[str, Any] = dict(NEW) | ({"cache_implementation": cache} if cache else {})
    if kind == "padded":
        mask = torch.ones_like(ids)
        mask[0, :5] = mask[1, :1] = 0
        arguments["attention_mask"] = mask
    if kind == "beams":
        arguments["num_beams"] = 3
    if kind == "sampling":
        arguments |= {"do_sample": True, "top_k": 1}  # sampling code, deterministic choice
    compiled = torch.compile(make(), backend="unicorn", options=NONE)
    with watch(monkeypatch) as ran:
        got = compiled.generate(ids, **arguments)
    decoded_with(ran)
    if kind == "beams":
        assert torch.equal(got, make().generate(ids, **arguments))
    else:
        assert_same_tokens(got, make(), inputs=ids, **arguments)


@pytest.mark.parametrize("how", ["prompt_lookup", "assistant"])
def test_speculative_decoding(how: str, make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    extra = {"prompt_lookup_num_tokens": 3} if how == "prompt_lookup" else {"assistant_model": make()}
    ids = prompt(8).repeat(1, 4)
    compiled = torch.compile(make(), backend="unicorn", options=NONE)
    with watch(monkeypatch) as ran:
        got = compiled.generate(ids, max_new_tokens=16, do_sample=False, **extra)
        graphs = ran.graphs
        compiled.generate(ids, max_new_tokens=16, do_sample=False, **extra)
    decoded_with(ran)
    assert ran.graphs == graphs, "a second call compiles nothing"
    assert_same_tokens(got, make(), inputs=ids, max_new_tokens=16, do_sample=False)


def test_streaming(make: Callable[[], Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TextStreamer

    compiled = torch.compile(make(), backend="unicorn", options=NONE)
    heard = io.StringIO()
    with watch(monkeypatch) as ran, redirect_stdout(heard):
        tokens = compiled.generate(prompt(10), streamer=TextStreamer(tokenizer, skip_prompt=True), **NEW)
    decoded_with(ran)
    assert heard.getvalue().strip() == tokenizer.decode(tokens[0, 10:]).strip()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_three_turns_with_a_kept_cache(cache: str, make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each turn continues the cache of the one before, past the sliding window."""
    from transformers import DynamicCache, StaticCache

    model = make()
    compiled = torch.compile(model, backend="unicorn", options=NONE)
    config = model.config
    kept = DynamicCache(config=config) if cache == "dynamic" else StaticCache(config=config, max_cache_len=256)
    ids = torch.empty(1, 0, dtype=torch.long)
    with watch(monkeypatch) as ran:
        for turn, tokens in enumerate((20, 70, 60)):
            ids = torch.cat([ids, prompt(tokens)], 1)
            got = compiled.generate(ids, past_key_values=kept, **NEW)
            assert_same_tokens(got, make(), inputs=ids, **NEW)
            ids = got
            assert turn == 0 or ran.graphs <= 3, "prefill, decode, and prefill on a filled cache"
    decoded_with(ran)


def test_logits_equal_eager_within_bf16_rounding(make: Callable[[], Any]) -> None:
    """Recipe "none": the same bf16 weights through our graph path.

    Each of the 3 x 2 residual adds and the head round to bf16 (relative 2^-8) at slightly different
    places, so logits may differ by a few units in the last place of their own size.
    """
    model = make()
    compiled = torch.compile(make(), backend="unicorn", options=NONE)
    with torch.no_grad():
        want, got = model(prompt(40)).logits.float(), compiled(prompt(40)).logits.float()
    bound = (2 * LAYERS + 1) * 2**-8 * want.abs().max()
    assert (got - want).abs().max() <= bound < want.std()


def test_closure_over_a_model_is_quantized_too(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from unicorn_backend.quantize.modules import QuantLinear

    model = make()
    fn = torch.compile(lambda ids: model(ids).logits, backend="unicorn")
    with watch(monkeypatch) as ran, torch.no_grad():
        fn(prompt(10))
    assert any(isinstance(module, QuantLinear) for module in model.modules())
    decoded_with(ran)
    assert "w4g32" in {scheme for step in ran.plans[-1].steps for scheme in step.schemes}
