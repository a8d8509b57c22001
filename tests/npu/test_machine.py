"""What `unicorn doctor` says of a machine's NPU, on made-up /sys trees and with a stand-in for `xrt-smi`.

`make test-xrt` asks the real `xrt-smi` the same over the fake kernel driver.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unicorn_backend import doctor
from unicorn_backend.checks import Check
from unicorn_backend.runtime import close_devices, open_device
from unicorn_backend.runtime.npu import emulator, machine

ADDRESS = "0000:c4:00.1"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hawk Point with everything in place; tests take things away."""
    device = tmp_path / "sys/bus/pci/devices" / ADDRESS
    for folder in (
        device / "accel/accel0",
        tmp_path / "sys/bus/pci/drivers/amdxdna",
        tmp_path / "sys/kernel/iommu_groups/12",
        tmp_path / "sys/module/amdxdna",
        tmp_path / "dev/accel",
    ):
        folder.mkdir(parents=True)
    for name, value in {"vendor": "0x1022", "device": "0x1502", "fw_version": "1.5.5.391"}.items():
        (device / name).write_text(f"{value}\n")
    (device / "driver").symlink_to(tmp_path / "sys/bus/pci/drivers/amdxdna")
    (device / "iommu_group").symlink_to(tmp_path / "sys/kernel/iommu_groups/12")
    (tmp_path / "dev/accel/accel0").touch()
    monkeypatch.setattr(platform, "release", lambda: "6.14.0-generic")
    monkeypatch.setattr(machine.ctypes.util, "find_library", lambda name: f"lib{name}.so.2")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    return tmp_path


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts an xrt-smi on the path that reports what it is given, in the form of the real one of XRT 2.25."""

    def install(mode: str = "turbo", held: int = 0, error: str = "") -> None:
        contexts = [{"pid": str(1000 + i), "status": "Idle"} for i in range(held)]
        report: dict[str, Any] = {
            "devices": [
                {
                    "device_id": ADDRESS,
                    "platforms": [{"static_region": {"name": "RyzenAI-npu1"}, "status": {"power_mode": mode}}],
                    "aie_partitions": {"partitions": [{"hw_contexts": contexts}] if held else ""},
                }
            ]
        }
        (tmp_path / "report.json").write_text(json.dumps(report))
        tool = tmp_path / "tools/xrt-smi"
        tool.parent.mkdir(exist_ok=True)
        fails = f"echo '[xrt-smi] ERROR: {error}' >&2; exit 1" if error else ""
        tool.write_text(f'#!/bin/sh\n{fails}\nfor last; do :; done\ncp {tmp_path}/report.json "$last"\n')
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")

    return install


def named(checks: list[Check]) -> dict[str, Check]:
    assert all(bool(check.fix) != (check.status == "ok") for check in checks), "a fix where something is not ok"
    return {check.name: check for check in checks}


def test_a_machine_with_everything(root: Path, smi: Callable[..., None]) -> None:
    smi()
    found = named([*machine.examine(root), *machine.ask_xrt(root)])
    assert all(check.status == "ok" for check in found.values())
    assert found["npu"].found.startswith("XDNA 1 (Phoenix, Hawk Point); driver amdxdna, the kernel's own; Linux 6.14")
    assert found["npu device"].found.endswith("accel0, firmware 1.5.5.391")
    assert found["npu contexts"].found == "6 of 6 free" and found["npu power"].found == "mode turbo"
    assert machine.problem(root) == ""
    module = root / "sys/module/amdxdna"
    (module / "taint").write_text("OE\n")
    (module / "version").write_text("2.25.0\n")
    assert "driver amdxdna, 2.25.0 built beside the kernel" in machine.examine(root)[0].found


Break = Callable[[Path, pytest.MonkeyPatch], Any]
DEVICE = Path("sys/bus/pci/devices") / ADDRESS
BROKEN: dict[str, tuple[Break, str, str, str]] = {  # what -> the check that says so, what it found, its fix
    "another chip": (lambda r, _: (r / DEVICE / "device").write_text("0x1641"), "npu", "none on the PCI bus", "BIOS"),
    "old kernel": (
        lambda r, m: ((r / "sys/module/amdxdna").rmdir(), m.setattr(platform, "release", lambda: "6.8.0-31-generic")),
        "npu",
        "Linux 6.8.0-31-generic has no driver amdxdna",
        "6.14 or newer",
    ),
    "not loaded": (lambda r, _: (r / "sys/module/amdxdna").rmdir(), "npu", "not loaded", "modprobe amdxdna"),
    "not bound": (lambda r, _: (r / DEVICE / "driver").unlink(), "npu", "did not take the device", "linux-firmware"),
    "no node": (lambda r, _: (r / "dev/accel/accel0").unlink(), "npu device", "did not bring", "linux-firmware"),
    "not ours": (lambda r, m: m.setattr(os, "access", lambda *_: False), "npu device", "no access to", "-aG render"),
    "no iommu": (lambda r, _: (r / DEVICE / "iommu_group").unlink(), "npu iommu", "IOMMU off", "AMD-Vi"),
    "no xrt": (
        lambda r, m: m.setattr(machine.ctypes.util, "find_library", lambda _: None),
        "xrt libraries",
        "XRT is not installed",
        "libxrt2 libxrt-npu2",
    ),
    "no driver library": (
        lambda r, m: m.setattr(machine.ctypes.util, "find_library", lambda n: "x.so.2" if "core" in n else None),
        "xrt libraries",
        "no libxrt_driver_xdna.so.2",
        "libxrt-npu2",
    ),
    "memlock": (
        lambda r, m: m.setattr(resource, "getrlimit", lambda _: (8 << 20,) * 2),
        "locked memory",
        "8.4 MB",
        "LimitMEMLOCK=infinity",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_missing_is_said_with_its_fix(root: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    spoil, name, says, fix = BROKEN[what]
    spoil(root, monkeypatch)
    check = named(machine.examine(root))[name]
    assert check.status == ("info" if what == "another chip" else "warn")
    assert says in check.found and fix in check.fix
    assert machine.problem(root) == f"{check.found} ({check.fix})"


def test_the_power_mode_is_told_and_left_alone(root: Path, smi: Callable[..., None]) -> None:
    for mode, status in (("turbo", "ok"), ("default", "info"), ("powersaver", "warn"), ("N/A", "info")):
        smi(mode=mode)
        check = named(machine.ask_xrt(root))["npu power"]
        assert check.status == status and (mode if mode != "N/A" else "unknown") in check.found
        assert mode in ("turbo", "N/A") or "xrt-smi configure --pmode turbo" in check.fix


def test_contexts_that_others_hold(root: Path, smi: Callable[..., None]) -> None:
    smi(held=5)
    check = named(machine.ask_xrt(root))["npu contexts"]
    assert check.status == "warn" and check.found == "1 of 6 free" and "processes 1000, 1001" in check.fix
    (root / DEVICE / "device").write_text("0x17f0")
    assert named(machine.ask_xrt(root))["npu contexts"].found == "11 of 16 free"


def test_unknown_where_it_cannot_be_read(root: Path, smi: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    smi(error="DRM_IOCTL_AMDXDNA_CREATE_BO IOCTL failed (err=-11): Resource temporarily unavailable")
    for check in machine.ask_xrt(root):
        assert check.status == "info" and "unknown: xrt-smi: " in check.found and "ulimit -l" in check.found
    monkeypatch.setenv("PATH", "")
    assert {check.found for check in machine.ask_xrt(root)} == {"unknown: no xrt-smi"}


def test_a_pyxrt_for_another_python(root: Path) -> None:
    assert machine.other_pythons(root) == ""
    folder = root / "usr/lib/python3/dist-packages"
    folder.mkdir(parents=True)
    (folder / f"pyxrt.cpython-3{sys.version_info.minor}-x86_64-linux-gnu.so").touch()
    assert machine.other_pythons(root) == ""
    (folder / "pyxrt.cpython-399-x86_64-linux-gnu.so").touch()
    assert "is for Python 3.99, this is 3." in machine.other_pythons(root)


def test_doctor_lists_them_and_how_the_npu_is_reached(
    root: Path, smi: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    smi("default")
    examine, ask = machine.examine, machine.ask_xrt
    monkeypatch.setattr(machine, "examine", lambda: examine(root))
    monkeypatch.setattr(machine, "ask_xrt", lambda: ask(root))
    monkeypatch.setenv("UNICORN_NPU_KERNELS", str(root))
    monkeypatch.setitem(sys.modules, "pyxrt", None)
    found = named(doctor.check_npu())
    assert found["xrt"].status == "warn" and "kernels/build.py wrapper" in found["xrt"].fix
    monkeypatch.setitem(sys.modules, "pyxrt", emulator)
    found = named(doctor.check_npu())
    assert found["xrt"].found == "RyzenAI-npu1 through pyxrt, runlists"
    assert found["npu power"].found == "mode default"
    (root / "dev/accel/accel0").unlink()
    assert "xrt" not in named(doctor.check_npu())


def test_the_reason_for_the_cpu_is_the_first_problem(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `explain` prints it: what is wrong with the machine, its fix, then what the binding said."""
    examine = machine.examine
    monkeypatch.setattr(machine, "examine", lambda _=None: examine(root))
    monkeypatch.setitem(sys.modules, "pyxrt", None)
    (root / DEVICE / "iommu_group").unlink()
    close_devices()
    reason = open_device("npu")
    assert isinstance(reason, str) and reason.startswith("IOMMU off") and "AMD-Vi" in reason and "pyxrt" in reason
    close_devices()
