"""The contract that `make test-xrt` checks on the real XRT, on the emulator; and the chroot script's own honesty."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.npu.xrt import contract
from unicorn_backend.runtime.npu import emulator, host_model
from unicorn_backend.runtime.npu.engine import NpuEngine
from unicorn_backend.runtime.npu.xrt import WRAPPER, PyXrt, find_xrt


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("contract")
    for design in contract.DESIGNS:
        host_model.build(design, made)
    return made


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(emulator, "faults", emulator.Faults())
    monkeypatch.setattr(emulator, "generation", "npu1")
    monkeypatch.setattr(contract, "failures", [])
    yield


def test_emulator_keeps_the_contract(folder: Path) -> None:
    contract.test_module(emulator, folder)
    contract.test_engine(contract.engine_of("emulator", folder))
    assert not contract.failures


FAULTS = {
    "hang": emulator.Faults(hang=True),
    "abort": emulator.Faults(state=6),
    "midway-hang": emulator.Faults(hang=True, after=5),
    "midway-abort": emulator.Faults(state=6, after=5),
    "error": emulator.Faults(state=5),
    "memory": emulator.Faults(memory_bytes=8 << 20),
    "buffers": emulator.Faults(memory_bytes=emulator.HEAP_BYTES + (8 << 10)),
    "contexts": emulator.Faults(contexts=0),
    "firmware": emulator.Faults(no_firmware=True),
    **dict.fromkeys(("truncated", "damaged", "another-k"), emulator.Faults()),
}


def test_without_runlists_single_runs(folder: Path) -> None:
    """As with a pyxrt that has none; the label says so."""
    module = SimpleNamespace(**{name: value for name, value in vars(emulator).items() if name != "runlist"})
    engine = NpuEngine(PyXrt(module, "pyxrt"), folder, True, contract.BUDGET, 60_000)
    assert engine.xrt.label == "RyzenAI-npu1 through pyxrt, single runs"
    assert contract.one_by_one(engine, 5)


def test_an_earlier_wrapper_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "wrapper.cpp"
    source.write_text('extern "C" void* unicorn_xrt_open(int) { return nullptr; }')
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(tmp_path / WRAPPER)], check=True)
    assert "earlier sources: build it again" in str(find_xrt(tmp_path))


@pytest.mark.parametrize("fault", FAULTS)
def test_emulator_fails_as_the_real_one(folder: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulator, "faults", FAULTS[fault])
    assert contract.main("emulator", str(folder), fault) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="without root it is skipped for that reason already")
def test_the_chroot_script_says_that_it_was_skipped(tmp_path: Path) -> None:
    script = Path(contract.__file__).with_name("run.sh")
    tools = tmp_path / "tools"  # a PATH with what the script needs, and no debootstrap
    tools.mkdir()
    for name in ("bash", "env", "dirname", "cat"):
        found = subprocess.run(["which", name], capture_output=True, text=True).stdout.strip()
        (tools / name).symlink_to(found)
    environment = {"PATH": str(tools), "UNICORN_XRT_CHROOT": str(tmp_path / "none"), "HOME": str(tmp_path)}
    done = subprocess.run([str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("test-xrt skipped: debootstrap is missing"), done.stderr
