"""The compile cache in processes of their own: what is loaded, and above all what must not be.

One process compiles and stores. A second one changes one thing at a time (a patched method, a hook, a config
value, ...), and must compile anew and compute what eager computes with the same change; at its end, with
everything as it was, it must load. Recipe "none", so that eager is the reference within bf16 rounding.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

LAYERS = 2
ROOT = Path(__file__).parents[1]
NEW = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


@functools.cache
def weights() -> dict[str, torch.Tensor]:
    from unicorn_backend.models import load

    return {name: tensor.clone() for name, tensor in load().state_dict().items()}


def make(**changes: Any) -> Any:
    """The embedded model cut to two layers, one sliding (window 128) and one full."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from unicorn_backend.models import TINY

    dtype = changes.pop("dtype", torch.bfloat16)
    config = AutoConfig.from_pretrained(TINY, num_hidden_layers=LAYERS)
    config.layer_types = ["sliding_attention", "full_attention"]
    for name, value in changes.items():
        if name == "rope_theta":
            config.rope_parameters["full_attention"]["rope_theta"] = value
        else:
            setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(weights(), strict=False)
    return model.eval()


def prompt(tokens: int = 24) -> torch.Tensor:
    return torch.randint(3, 4000, (1, tokens), generator=torch.Generator().manual_seed(tokens))


# ---- what the second process changes: each a context manager around making and running a model -------------


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = owner.__dict__[name] if isinstance(owner, type) else getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _gemma() -> Any:
    from transformers.models.gemma3 import modeling_gemma3

    return modeling_gemma3


def _plus(plain: Callable[..., Any], factor: float) -> Callable[..., Any]:
    """A feed-forward that adds its input: the norm after it would hide a mere scale."""

    def forward(self: Any, x: Any) -> Any:
        return plain(self, x) + factor * x

    return forward


def patched_method(factor: float = 1.0) -> Any:
    """With another factor: same code, another closure."""
    mlp = _gemma().Gemma3MLP
    return _patched(mlp, _plus(mlp.forward, factor))


def patched_default(factor: float = 1.0) -> Any:
    """With another factor: same code, another default value."""
    mlp = _gemma().Gemma3MLP
    plain = mlp.forward

    def forward(self: Any, x: Any, factor: float = 0.0) -> Any:
        return plain(self, x) - factor * x

    forward.__defaults__ = (factor,)
    return _patched(mlp, forward)


@contextlib.contextmanager
def _patched(owner: type, forward: Any) -> Iterator[Callable[[], Any]]:
    with replaced(owner, "forward", forward):
        yield make


@contextlib.contextmanager
def patched_function() -> Iterator[Callable[[], Any]]:
    def no_rotation(q: Any, k: Any, *args: Any, **kwargs: Any) -> Any:
        return q, k

    with replaced(_gemma(), "apply_rotary_pos_emb", no_rotation):
        yield make


@contextlib.contextmanager
def patched_torch() -> Iterator[Callable[[], Any]]:
    functional = torch.nn.functional
    plain = functional.scaled_dot_product_attention

    def negative(*args: Any, **kwargs: Any) -> Any:
        return -plain(*args, **kwargs)

    with replaced(functional, "scaled_dot_product_attention", negative):
        yield make


@contextlib.contextmanager
def patched_call() -> Iterator[Callable[[], Any]]:
    """`__call__` of a class whose `forward` stays."""
    mlp = _gemma().Gemma3MLP
    mlp.__call__ = _plus(torch.nn.Module._call_impl, 1.0)
    try:
        yield make
    finally:
        del mlp.__call__


@contextlib.contextmanager
def registered_attention() -> Iterator[Callable[[], Any]]:
    """Another function under the name that the config gives."""
    registry = _gemma().ALL_ATTENTION_FUNCTIONS
    plain = registry["sdpa"]

    def negative(*args: Any, **kwargs: Any) -> Any:
        out, weights = plain(*args, **kwargs)
        return -out, weights

    registry["sdpa"] = negative
    try:
        yield make
    finally:
        del registry._local_mapping["sdpa"]


@contextlib.contextmanager
def forward_hook() -> Iterator[Callable[[], Any]]:
    def hooked() -> Any:
        model = make()
        model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output + args[0])
        return model

    yield hooked


@contextlib.contextmanager
def global_hook() -> Iterator[Callable[[], Any]]:
    def add(module: Any, args: Any, output: Any) -> Any:
        return output + args[0] if type(module).__name__ == "Gemma3MLP" else output

    handle = torch.nn.modules.module.register_module_forward_hook(add)
    try:
        yield make
    finally:
        handle.remove()


@contextlib.contextmanager
def instance_override() -> Iterator[Callable[[], Any]]:
    def overridden() -> Any:
        model = make()
        mlp = model.model.layers[0].mlp
        plain = mlp.forward
        mlp.forward = lambda x: plain(x) + x
        return model

    yield overridden


@contextlib.contextmanager
def other_class() -> Iterator[Callable[[], Any]]:
    def changed() -> Any:
        model = make()
        mlp, plain = model.model.layers[0].mlp, _gemma().Gemma3MLP
        body = {"forward": _plus(plain.forward, 1.0), "__module__": plain.__module__}
        mlp.__class__ = type("Gemma3MLP", (plain,), body)
        return model

    yield changed


@contextlib.contextmanager
def shared_layer() -> Iterator[Callable[[], Any]]:
    def changed() -> Any:
        model = make()
        model.model.layers[1].mlp = model.model.layers[0].mlp
        return model

    yield changed


def built_with(**changes: Any) -> Callable[[], Any]:
    @contextlib.contextmanager
    def case() -> Iterator[Callable[[], Any]]:
        yield lambda: make(**changes)

    return case


CASES: dict[str, Callable[[], Any]] = {
    "patched method": patched_method,
    "patched function": patched_function,
    "other closure": lambda: patched_method(3.0),
    "other default": lambda: patched_default(3.0),
    "patched torch": patched_torch,
    "patched call": patched_call,
    "registered attention": registered_attention,
    "forward hook": forward_hook,
    "global hook": global_hook,
    "instance override": instance_override,
    "other class": other_class,
    "shared layer": shared_layer,
    "sliding window": built_with(sliding_window=4),
    "rope theta": built_with(rope_theta=100.0),
    "eps": built_with(rms_norm_eps=0.5),
    "dtype": built_with(dtype=torch.float32),
    "attention implementation": built_with(_attn_implementation="eager"),
}


# ---- the processes -----------------------------------------------------------------------------------------


def logits_of(model: Any, **options: Any) -> dict[str, Any]:
    """Loaded and stored graphs of one forward, and its distance to eager and to the unchanged model."""
    from unicorn_backend.integration.compile_cache import Statistics

    torch._dynamo.reset()
    loaded, stored, reasons = Statistics.loaded, Statistics.stored, len(Statistics.reasons)
    with torch.no_grad():
        want = model(prompt(), use_cache=False).logits.float()
        got = torch.compile(model, backend="unicorn", options={"recipe": "none", **options})(
            prompt(), use_cache=False
        ).logits.float()
    return {
        "loaded": Statistics.loaded - loaded,
        "stored": Statistics.stored - stored,
        "reasons": Statistics.reasons[reasons:],
        "error": float((got - want).abs().max() / want.abs().max()),
        "logits": want[0, -1, :64].tolist(),
    }


def tokens_of(lengths: tuple[int, ...]) -> dict[str, Any]:
    import unicorn_backend
    from unicorn_backend.integration.compile_cache import Statistics

    torch._dynamo.reset()
    loaded, stored = Statistics.loaded, Statistics.stored
    model = make()
    compiled = torch.compile(model, backend="unicorn", options={"recipe": "none"})
    tokens = [compiled.generate(prompt(length), **NEW)[0, length:].tolist() for length in lengths]
    loaded, stored = Statistics.loaded - loaded, Statistics.stored - stored
    os.environ["UNICORN_CACHE"] = "0"
    with torch.no_grad():
        beside = compiled(prompt(), use_cache=False, logits_to_keep=2).logits  # a new trace beside loaded graphs
    os.environ["UNICORN_CACHE"] = "1"
    return {
        "loaded": loaded,
        "stored": stored,
        "beside": beside.argmax(-1).tolist(),
        "tokens": tokens,
        "explained": [plan.summary().split(":", 1)[1] for plan in unicorn_backend.explain(model).plans],
    }


def first_process() -> dict[str, Any]:
    tokens = tokens_of((24, 10, 130))
    with patched_method(2.0) as build:
        closure = logits_of(build())
    with patched_default(2.0) as build:
        default = logits_of(build())
    return {"plain": logits_of(make()), "generate": tokens, "other closure": closure, "other default": default}


def second_process() -> dict[str, Any]:
    results: dict[str, Any] = {"generate": tokens_of((24, 10, 130))}
    for name, case in CASES.items():
        with case() as build:
            results[name] = logits_of(build())
    results["options"] = logits_of(make(), keep_weights=True)
    results["off"] = logits_of(make(), cache=False)
    folder = Path(os.environ["UNICORN_CACHE_DIR"])
    for name, damage in (("truncated", lambda data: data[: len(data) // 2]), ("corrupted", flip)):
        copy = folder.with_name(name)
        shutil.copytree(folder, copy)
        for path in (copy / "compiled").iterdir():
            path.write_bytes(damage(path.read_bytes()))
        os.environ["UNICORN_CACHE_DIR"] = str(copy)
        results[name] = logits_of(make())
        os.environ["UNICORN_CACHE_DIR"] = str(folder)
    os.chmod(folder / "compiled", 0o755)
    results["open folder"] = logits_of(make())
    os.chmod(folder / "compiled", 0o700)
    results["plain"] = logits_of(make())
    return results


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def run_process(name: str, folder: Path) -> dict[str, Any]:
    command = f"import json, tests.test_compile_cache as t; print('RESULT' + json.dumps(t.{name}()))"
    done = subprocess.run(
        [sys.executable, "-c", command],
        env={**os.environ, "UNICORN_CACHE": "1", "UNICORN_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "2"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answer: dict[str, Any] = json.loads(done.stdout.split("RESULT")[-1])
    return answer


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """What both say. They take a minute, so pytest's own processes share one pair of them."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    said = shared / "compile-cache.json"
    with FileLock(f"{said}.lock"):
        if not said.exists():
            folder = shared / "compile-cache-of-processes" / "unicorn"
            results = [run_process(name, folder) for name in ("first_process", "second_process")]
            said.write_text(json.dumps(results))
        first, second = json.loads(said.read_text())
    return first, second


TOLERANCE = (2 * LAYERS + 1) * 2**-8  # a rounding to bf16 per residual add and at the head


def test_second_process_loads_every_graph_and_gives_the_same_tokens(processes: Any) -> None:
    first, second = processes
    assert (first["plain"]["loaded"], first["plain"]["stored"]) == (0, 1)
    assert (first["generate"]["loaded"], first["generate"]["stored"]) == (0, 2)
    assert (second["plain"]["loaded"], second["plain"]["stored"]) == (1, 0), second["plain"]
    assert (second["generate"]["loaded"], second["generate"]["stored"]) == (2, 0), "prompts of 10, 24 and 130 tokens"
    assert second["plain"]["error"] <= TOLERANCE
    assert second["generate"]["beside"] == first["generate"]["beside"]
    assert second["generate"]["tokens"] == first["generate"]["tokens"]
    assert second["generate"]["explained"] == first["generate"]["explained"]


@pytest.mark.parametrize("case", CASES)
def test_a_changed_model_is_not_given_the_old_graph(case: str, processes: Any) -> None:
    first, second = processes
    assert second[case]["loaded"] == 0
    assert second[case]["error"] <= TOLERANCE, "the compiled model computes what eager does with this change"
    if case in first:
        assert first[case]["stored"] == 1, "it could have been loaded by mistake"
    if case not in ("dtype", "attention implementation"):
        distance = torch.tensor(second[case]["logits"]) - torch.tensor(first["plain"]["logits"])
        assert distance.abs().max() > 0.1, "the change is one that matters"


@pytest.mark.parametrize("case", ["options", "off", "truncated", "corrupted", "open folder"])
def test_not_loaded(case: str, processes: Any) -> None:
    result = processes[1][case]
    assert result["loaded"] == 0
    assert result["stored"] == (0 if case in ("off", "open folder") else 1)
    assert result["error"] <= TOLERANCE
    if case in ("truncated", "corrupted"):
        assert any("is damaged" in reason for reason in result["reasons"])


def test_hooks_and_overrides_say_why_they_are_not_cached(processes: Any) -> None:
    second = processes[1]
    for case, word in (("forward hook", "_forward_hooks"), ("instance override", "replaced on the instance")):
        assert second[case]["stored"] == 0
        assert any(word in reason for reason in second[case]["reasons"]), second[case]["reasons"]


def test_files_are_whole_whoever_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four threads write and read one key; every read gives one of the contents."""
    from unicorn_backend.integration import compile_cache

    contents = [bytes([i]) * (1 << 16) for i in range(4)]
    monkeypatch.setattr(compile_cache, "MAX_FILES", 3)
    wrong: list[Any] = []

    def work(data: bytes) -> None:
        for _ in range(20):
            compile_cache._write(tmp_path, "key", data)
            found = [compile_cache._read(path) for path in compile_cache._candidates(tmp_path, "key")]
            wrong.extend(got for got in found if got is not None and got not in contents)

    threads = [threading.Thread(target=work, args=(data,)) for data in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(list(tmp_path.iterdir())) <= 4 and not list(tmp_path.glob("*.tmp"))


def test_a_graph_survives_the_file() -> None:
    """Targets, nested arguments, slices and constants; what has no name is refused."""
    from unicorn_backend.integration import graph_file

    class Plain(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            y = torch.cat([x[:, 1:3], x[:, :2].to(torch.float64).float()], dim=1)
            return y.clamp(min=-1.5), {"sum": y.sum(-1)}

    gm = torch.fx.symbolic_trace(Plain())
    aten = torch.fx.experimental.proxy_tensor.make_fx(gm)(torch.randn(2, 4))
    loaded = graph_file.load(graph_file.dump(aten))
    x = torch.randn(2, 4)
    for got, want in zip(loaded(x)[1].values(), aten(x)[1].values(), strict=True):
        assert torch.equal(got, want)
    assert torch.equal(loaded(x)[0], aten(x)[0])

    nameless = torch.fx.Graph()
    nameless.output(nameless.call_function(lambda: 1))
    with pytest.raises(graph_file.NotPortable, match="name"):
        graph_file.dump(torch.fx.GraphModule({}, nameless))


def test_fingerprints_see_code_defaults_closures_and_methods() -> None:
    from unicorn_backend.integration.fingerprint import Describer

    def maker(inside: Any, default: Any = 1) -> Any:
        def function(x: Any, y: Any = default) -> Any:
            return x, y, inside

        return function

    class One:
        def method(self) -> int:
            return 1

    def digest(value: Any) -> str:
        return Describer().digest(value)

    assert digest(maker(1)) == digest(maker(1))
    assert len({digest(maker(1)), digest(maker(2)), digest(maker(1, 2)), digest(maker(maker(1)))}) == 4
    before = digest(One)
    assert before == digest(One)
    One.method = lambda self: 2  # type: ignore[method-assign]
    assert digest(One) != before
    assert Describer().exact([1, "a", (2.5, None)]) is not None
    assert Describer().exact([object()]) is None


def test_operators_that_nobody_asked_for_yet_are_found() -> None:
    """torch makes an operator's attribute on its first use; a stored graph may name one before that."""
    from unicorn_backend.integration.compile_cache import _by_name

    library = torch.library.Library("unicorn", "FRAGMENT")
    library.define("never_asked_for(Tensor x) -> Tensor")
    assert "never_asked_for" not in vars(torch.ops.unicorn)
    assert _by_name(torch, "ops.unicorn.never_asked_for") is torch.ops.unicorn.never_asked_for
