"""The contract that `make test-xrt` checks on the real XRT, on the emulator; and the chroot script's own honesty."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.npu.xrt import contract
from unicorn_backend.runtime.npu import emulator, host_model


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
    "error": emulator.Faults(state=5),
    "memory": emulator.Faults(memory_bytes=8 << 10),
    "contexts": emulator.Faults(contexts=0),
    "firmware": emulator.Faults(no_firmware=True),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_emulator_fails_as_the_real_one(folder: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulator, "faults", FAULTS[fault])
    assert contract.main("emulator", str(folder), fault) == 0


def test_a_truncated_xclbin_is_refused(folder: Path, tmp_path: Path) -> None:
    for design in contract.DESIGNS:
        source = contract.artifact_of(folder, design).folder
        target = tmp_path / source.name
        target.mkdir()
        for path in source.iterdir():
            data = path.read_bytes()
            (target / path.name).write_bytes(data[:20] if path.name == "kernel.xclbin" else data)
    assert contract.main("emulator", str(tmp_path), "truncated") == 0


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
