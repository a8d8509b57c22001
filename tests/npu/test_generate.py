"""Drop-in: `generate` of the embedded model with attention on the (emulated) NPU, and what happens when it fails."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import unicorn_backend
from unicorn_backend.runtime import close_devices, open_device
from unicorn_backend.runtime.npu import emulator
from unicorn_backend.runtime.npu.device import NpuDevice
from unicorn_backend.runtime.npu.engine import CHAIN, NpuEngine, NumpyEngine

pytestmark = pytest.mark.usefixtures("clean")
PROMPT, NEW = 40, 10


def generate(model: Any, devices: tuple[str, ...] = ("cpu", "npu"), **options: Any) -> tuple[torch.Tensor, Any]:
    """(logits of every new token [NEW, vocabulary], the compiled model).

    Tokens alone say little: of a random model without most of its layers they are all the same.
    """
    compiled: Any = torch.compile(model, backend="unicorn", options={"devices": devices, **options})
    ids = (torch.arange(PROMPT) * 37 % 4000 + 10).unsqueeze(0)
    settings = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = compiled.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return torch.cat(out.logits), compiled


def shortened(model: Any, layers: int) -> Any:
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    model.config.layer_types = model.config.layer_types[:layers]
    return model


@pytest.fixture
def make_short(make_tiny: Callable[[], Any]) -> Callable[[], Any]:
    """The embedded model's first layer, for what does not depend on the number of layers."""

    return lambda: shortened(make_tiny(), 1)


@pytest.fixture(scope="module")
def on_cpu() -> dict[str, torch.Tensor]:
    """The logits of `make_short` on the CPU, computed once."""
    return {}


def cpu_logits(make_short: Callable[[], Any], known: dict[str, torch.Tensor]) -> torch.Tensor:
    if "logits" not in known:
        known["logits"] = generate(make_short(), ("cpu",))[0]
        torch._dynamo.reset()
    return known["logits"]


def device() -> NpuDevice:
    found = open_device("npu")
    assert isinstance(found, NpuDevice), found
    return found


def steps(compiled: Any) -> dict[str, set[str]]:
    """Kind -> devices, of the prompt's graph."""
    plan = unicorn_backend.explain(compiled).plans[0]
    found: dict[str, set[str]] = {}
    for step in plan.steps:
        found.setdefault(step.kind, set()).add(step.device)
    return found


def test_generate_on_the_emulated_npu(
    make_tiny: Callable[[], Any], emulate: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits equal those of the same integer arithmetic in NumPy; every attention region went through launches."""
    monkeypatch.setattr("unicorn_backend.runtime.npu.device._said", left := set[tuple[str, str]]())
    logits, compiled = generate(make_tiny())
    assert not left, "calls that ran on the CPU"
    engine = device().engine
    assert isinstance(engine, NpuEngine)
    tests = CHAIN * len(engine._kernels)
    assert engine.launches == tests + 6 * (1 + 2 + 1)  # layers: projections in, two K/V heads, projection out
    assert steps(compiled)["attention"] == steps(compiled)["qkv"] == {"npu (emulated)"}
    assert steps(compiled)["ffn"] == {"cpu"}
    text = str(unicorn_backend.explain(compiled))
    assert "npu (emulated)" in text and not re.search(r"\bnpu\b(?! \(emulated\)|:)", text)

    torch._dynamo.reset()
    close_devices()
    device().engine = NumpyEngine()
    same, _ = generate(make_tiny())
    assert torch.equal(logits, same)


def test_generate_with_the_shapes_of_gemma_3_1b(emulate: None) -> None:
    """Its attention, in one layer of a model that is small otherwise: logits of the same integers in NumPy."""

    def make() -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 1152, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256}
        small = {"vocab_size": 4096, "intermediate_size": 128, "num_hidden_layers": 1, "sliding_window": 512}
        return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **small)).eval().to(torch.bfloat16)

    logits, compiled = generate(make())
    assert device().engine.launches > 3 * CHAIN  # type: ignore[attr-defined]
    assert steps(compiled)["attention"] == steps(compiled)["qkv"] == {"npu (emulated)"}
    torch._dynamo.reset()
    close_devices()
    device().engine = NumpyEngine()
    assert torch.equal(logits, generate(make())[0])


def test_decode_stays_on_the_cpu(make_short: Callable[[], Any], emulate: None) -> None:
    """A step of one token launches nothing, also in the graph for any number of tokens."""
    model = make_short()
    _, compiled = generate(model)
    before = device().engine.launches  # type: ignore[attr-defined]
    with torch.inference_mode():
        compiled(torch.tensor([[5]]))
    assert device().engine.launches == before  # type: ignore[attr-defined]
    plans = unicorn_backend.explain(compiled).plans
    reasons = {step.reason for plan in plans if plan.tokens == "1" for step in plan.steps if step.kind == "attention"}
    assert reasons and all("1 tokens per call" in reason for reason in reasons)


def test_without_hardware_it_is_the_cpu_with_a_reason(
    make_short: Callable[[], Any], on_cpu: dict[str, torch.Tensor]
) -> None:
    logits, compiled = generate(make_short())
    assert steps(compiled)["attention"] == {"cpu"}
    (reason,) = {s.reason for s in unicorn_backend.explain(compiled).plans[0].steps if s.kind == "attention"}
    assert "npu: " in reason and ("PCI" in reason or "pyxrt" in reason)
    torch._dynamo.reset()
    assert torch.equal(logits, cpu_logits(make_short, on_cpu))


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "time-out": ({"hang": True}, "no answer in 0.5 s"),
    "abort": ({"state": 6}, "state ABORT"),
    "error": ({"state": 5}, "state ERROR"),
    "firmware": ({"no_firmware": True}, "is its firmware installed?"),
    "memlock": ({"memory_bytes": 8 << 20}, "ulimit -l"),
    "buffers": ({"memory_bytes": emulator.HEAP_BYTES + (8 << 10)}, "ulimit -l"),
    "contexts": ({"contexts": 0}, "no hardware context is free"),
    "wrong sums": ({"corrupt": True}, "does not give the CPU's integers"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_end_on_the_cpu(
    make_short: Callable[[], Any],
    emulate: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    on_cpu: dict[str, torch.Tensor],
    fault: str,
) -> None:
    """The CPU's logits, and one clear message."""
    what, says = FAULTS[fault]
    want = cpu_logits(make_short, on_cpu)
    monkeypatch.setattr(emulator, "faults", emulator.Faults(**what))
    if fault not in ("firmware", "memlock"):  # of which opening the device dies
        device().engine.timeout_ms = 500
    with caplog.at_level(logging.WARNING):
        got, compiled = generate(make_short())
    assert torch.equal(got, want)
    assert steps(compiled)["attention"] == {"cpu"}
    reasons = {step.reason for step in unicorn_backend.explain(compiled).plans[0].steps if step.kind == "attention"}
    assert all(says in reason for reason in reasons), reasons
    warned = [r for r in caplog.records if "goes back to the cpu" in r.getMessage()]
    assert len(warned) == len({r.getMessage().split("cpu: ")[1] for r in warned}) <= 2


def test_a_kernel_for_another_k_never_serves(
    make_short: Callable[[], Any],
    emulate: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    on_cpu: dict[str, torch.Tensor],
) -> None:
    """An artifact whose files are another K's, with a manifest that says nothing of it: the self-test sees it."""
    from unicorn_backend.runtime.npu import artifacts, host_model, wanted

    right, wrong = wanted.projection("npu1", 256, 512), wanted.projection("npu1", 128, 512)

    def swapped(folder: Path) -> None:
        made = host_model.build(wrong, tmp_path / "wrong").folder
        for name in (artifacts.XCLBIN, artifacts.LIBRARY, artifacts.INSTRUCTIONS):
            (folder / name).write_bytes((made / name).read_bytes())

    monkeypatch.setenv("UNICORN_NPU_KERNELS", str(tmp_path))
    artifacts.write(tmp_path / artifacts.EMULATED, right, artifacts.HOST_MODEL, swapped)
    # Attention, whose kernels are right, would stay on the NPU and give its own logits.
    monkeypatch.setattr(NpuDevice, "refuses", lambda _, work: "" if work.step.kind == "qkv" else "left out")
    close_devices()
    want = cpu_logits(make_short, on_cpu)
    got, compiled = generate(make_short())
    (reason,) = {s.reason for s in unicorn_backend.explain(compiled).plans[0].steps if s.kind == "qkv"}
    assert "does not give the CPU's integers on this machine: it must not serve" in reason
    assert torch.equal(got, want)


@pytest.mark.parametrize("registered", [False, True])
def test_truncated_xclbins_end_on_the_cpu(
    make_short: Callable[[], Any],
    emulate: None,
    kernels: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    on_cpu: dict[str, torch.Tensor],
    registered: bool,
) -> None:
    """Found by their checksums, or by XRT where they were truncated before these were taken: the CPU's logits."""
    from unicorn_backend.runtime.npu import artifacts, wanted

    want = cpu_logits(make_short, on_cpu)
    for design in (wanted.projection("npu1", 256, 512), wanted.attention("npu1", 64)):
        device().engine.prepare(design)  # builds it, unless an earlier test did
    shutil.copytree(kernels / artifacts.EMULATED, tmp_path / artifacts.EMULATED)
    for path in (tmp_path / artifacts.EMULATED).glob(f"*/{artifacts.XCLBIN}"):
        path.write_bytes(path.read_bytes()[:20])
        if registered:
            manifest = path.with_name(artifacts.MANIFEST)
            text = json.loads(manifest.read_text())
            text["files"][artifacts.XCLBIN] = artifacts._checksum(path)
            manifest.write_text(json.dumps(text))
    monkeypatch.setenv("UNICORN_NPU_KERNELS", str(tmp_path))
    close_devices()
    engine = device().engine
    assert isinstance(engine, NpuEngine)
    engine._builds = False  # as on hardware
    got, compiled = generate(make_short())
    assert torch.equal(got, want)
    reasons = {
        s.kind: s.reason for s in unicorn_backend.explain(compiled).plans[0].steps if s.kind in ("qkv", "attention")
    }
    says = (
        "the file is damaged: build the kernel again" if registered else "truncated or changed: build the kernel again"
    )
    assert len(reasons) == 2 and all(says in reason for reason in reasons.values()), reasons


def test_the_memory_budget_is_kept(emulate: None) -> None:
    from unicorn_backend.runtime.npu import wanted
    from unicorn_backend.runtime.npu.engine import Unavailable

    engine = device().engine
    assert isinstance(engine, NpuEngine)
    engine.budget_bytes = 1 << 16
    with pytest.raises(Unavailable, match="budget"):
        engine.prepare(wanted.attention("npu1", 64))


def test_the_environment_variable_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    from unicorn_backend.errors import OptionError

    monkeypatch.setenv("UNICORN_NPU_EMULATE", "yes")
    with pytest.raises(OptionError, match="allowed are 0, 1, npu1, npu2"):
        open_device("npu")
