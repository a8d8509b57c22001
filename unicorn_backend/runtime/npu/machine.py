"""What an NPU needs of the machine, each with its fix: for `unicorn doctor`, and for the reason why there is none.

The kernel's part is read from /sys and /dev, the rest is asked of `xrt-smi`, XRT's own tool, because it works whatever
Python this is. Needs no torch. Nothing here changes anything.
"""

from __future__ import annotations

import ctypes.util
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unicorn_backend.checks import Check
from unicorn_backend.runtime.npu.xrt import explain

VENDOR = "0x1022"
CHIPS = {"0x1502": "XDNA 1 (Phoenix, Hawk Point)", "0x17f0": "XDNA 2 (Strix, Krackan)"}
CONTEXTS = {"0x1502": 6, "0x17f0": 16}  # of the whole machine
KERNEL = (6, 14)  # the first with amdxdna in it
MEMLOCK_BYTES = 64 << 20
"""XRT locks a heap of this size when it opens the device; below it fails with err=-11."""
AMD_FOLDER = Path("/opt/xilinx/xrt")  # where AMD's own packages put XRT
SMI_SECONDS = 20


@dataclass(frozen=True)
class Chip:
    """An NPU on the PCI bus. `folder`: its place under /sys."""

    folder: Path
    device: str

    @property
    def name(self) -> str:
        return CHIPS[self.device]


def find_chip(root: Path = Path("/")) -> Chip | None:
    """The first NPU that there are kernels for."""
    for path in sorted((root / "sys/bus/pci/devices").glob("*/device")):
        device = path.read_text().strip()
        if device in CHIPS and (path.parent / "vendor").read_text().strip() == VENDOR:
            return Chip(path.parent, device)
    return None


def examine(root: Path = Path("/")) -> list[Check]:
    """Everything from the PCI bus to XRT; what needs an earlier one that is missing is left out."""
    chip = find_chip(root)
    if chip is None:
        fix = "if this is a Ryzen AI laptop: enable the NPU (IPU) in the BIOS"
        return [Check("npu", "info", "none on the PCI bus", fix)]
    checks = [_driver(root, chip)]
    if checks[-1].status == "ok":
        checks.append(_node(root, chip))
    return [*checks, _iommu(chip), _libraries(), _memlock()]


def problem(root: Path = Path("/")) -> str:
    """The first thing that keeps an NPU from being used, with its fix; "" if nothing does."""
    bad = next((check for check in examine(root) if check.status != "ok"), None)
    return f"{bad.found} ({bad.fix})" if bad else ""


def _driver(root: Path, chip: Chip) -> Check:
    """amdxdna, loaded and bound; which one: the kernel's own, or one built beside it."""
    module, bound = root / "sys/module/amdxdna", chip.folder / "driver"
    release = platform.release()
    old = tuple(map(int, re.findall(r"\d+", release)[:2])) < KERNEL
    if not module.exists() and old:
        fix = "install Linux 6.14 or newer (in Ubuntu 25.04; for 24.04 its HWE kernel), or AMD's driver package"
        return Check("npu", "warn", f"{chip.name}; Linux {release} has no driver amdxdna", fix)
    if not module.exists():
        fix = "sudo modprobe amdxdna; if there is none, install the kernel's extra modules (linux-modules-extra)"
        return Check("npu", "warn", f"{chip.name}; driver amdxdna not loaded", fix)
    if not bound.exists() or bound.resolve().name != "amdxdna":
        return Check("npu", "warn", f"{chip.name}; driver amdxdna loaded, but it did not take the device", _FIRMWARE)
    taint = module / "taint"
    outside = taint.exists() and "O" in taint.read_text()
    version = (module / "version").read_text().strip() + " " if (module / "version").exists() else ""
    which = f"{version}built beside the kernel" if outside else "the kernel's own"
    return Check("npu", "ok", f"{chip.name}; driver amdxdna, {which}; Linux {release}")


_FIRMWARE = (
    "sudo dmesg | grep amdxdna says why; often its firmware is missing: install linux-firmware of 2025 or newer, "
    "and see that the IOMMU is on"
)


def _node(root: Path, chip: Chip) -> Check:
    nodes = sorted(path.name for path in (chip.folder / "accel").glob("accel*"))
    node = root / "dev/accel" / (nodes[0] if nodes else "accel0")
    if not node.exists():
        return Check("npu device", "warn", f"no {node}: the driver did not bring the device up", _FIRMWARE)
    if not os.access(node, os.R_OK | os.W_OK):
        return Check("npu device", "warn", f"no access to {node}", "sudo usermod -aG render $USER; log in again")
    firmware = chip.folder / "fw_version"
    shown = firmware.read_text().strip() if firmware.exists() else "of unknown version"
    return Check("npu device", "ok", f"{node}, firmware {shown}")


def _iommu(chip: Chip) -> Check:
    group = chip.folder / "iommu_group"
    if not group.exists():
        fix = "enable the IOMMU (AMD-Vi) in the BIOS and start the kernel without iommu=off or amd_iommu=off"
        return Check("npu iommu", "warn", "IOMMU off: the driver cannot share memory with programs", fix)
    return Check("npu iommu", "ok", f"IOMMU on, group {group.resolve().name}")


def _libraries() -> Check:
    """libxrt and the library with which it drives an NPU. Finding them says nothing of Python's binding."""
    core, driver = (_library(name) for name in ("xrt_coreutil", "xrt_driver_xdna"))
    if core is None:
        fix = "sudo apt install libxrt2 libxrt-npu2 (Debian sid), or AMD's packages xrt and xrt_plugin-amdxdna"
        return Check("xrt libraries", "warn", "XRT is not installed", fix)
    if driver is None:
        fix = "sudo apt install libxrt-npu2, or AMD's package xrt_plugin-amdxdna"
        return Check("xrt libraries", "warn", f"{core}, but no libxrt_driver_xdna.so.2, so XRT sees no NPU", fix)
    return Check("xrt libraries", "ok", f"{core}, {driver}")


def _library(name: str) -> str | None:
    found = ctypes.util.find_library(name)
    if found is None and (path := AMD_FOLDER / f"lib/lib{name}.so.2").exists():
        return str(path)
    return found


def _memlock() -> Check:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    found = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit / 1e6:.1f} MB"
    if limit != resource.RLIM_INFINITY and limit < MEMLOCK_BYTES:
        fix = (
            f"the NPU needs {MEMLOCK_BYTES >> 10} kB (ulimit -l): put '* - memlock unlimited' into "
            "/etc/security/limits.d/unicorn.conf and log in again; for a systemd service LimitMEMLOCK=infinity"
        )
        return Check("locked memory", "warn", found, fix)
    return Check("locked memory", "ok", found)


# --- what XRT says ------------------------------------------------------------------------------


def ask_xrt(root: Path = Path("/")) -> list[Check]:
    """Free contexts and power mode. Opens the device, for a moment, in a process of its own."""
    chip = find_chip(root)
    if chip is None:
        return []
    report = _xrt_smi(chip.folder.name)
    if isinstance(report, str):
        fix = "sudo apt install libxrt-utils, or AMD's package xrt; then `xrt-smi examine` shows what is wrong"
        return [Check(name, "info", f"unknown: {report}", fix) for name in ("npu contexts", "npu power")]
    return [_contexts(chip, report), _power(report)]


def _xrt_smi(address: str) -> dict[str, Any] | str:
    """Its report on a device, or why there is none."""
    installed = shutil.which("xrt-smi") or shutil.which(str(AMD_FOLDER / "bin/xrt-smi"))
    if installed is None:
        return "no xrt-smi"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.json"
        command = [installed, "examine", "-d", address, "-r", "platform", "aie-partitions"]
        try:
            done = subprocess.run(
                [*command, "-f", "JSON", "-o", str(out)], capture_output=True, text=True, timeout=SMI_SECONDS
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"xrt-smi: {error}"
        if done.returncode:
            said = re.search(r"ERROR: (.*)", done.stderr + done.stdout)
            return f"xrt-smi: {explain(said[1]) if said else f'exit code {done.returncode}'}"
        try:
            report: dict[str, Any] = json.loads(out.read_text())
        except (OSError, ValueError) as error:
            return f"xrt-smi: no report ({error})"
    return report


def _contexts(chip: Chip, report: dict[str, Any]) -> Check:
    """Hardware contexts that nobody holds: each kernel of a model takes one."""
    partitions = next(_values(report, "partitions"), None)
    if partitions is None:
        return Check("npu contexts", "info", "unknown: xrt-smi does not list them", "XRT 2.25 and newer do")
    holders = [held for contexts in _values(partitions, "hw_contexts") for held in contexts]
    total = CONTEXTS[chip.device]
    found = f"{max(total - len(holders), 0)} of {total} free"
    if len(holders) > total - 3:
        pids = ", ".join(dict.fromkeys(str(held.get("pid", "?")) for held in holders))
        fix = f"a model takes up to three; close programs that use the NPU (processes {pids})"
        return Check("npu contexts", "warn", found, fix)
    return Check("npu contexts", "ok", found)


def _power(report: dict[str, Any]) -> Check:
    """Never changed by this package: it costs battery and heat, and belongs to all programs."""
    mode = next((str(value) for key in ("power_mode", "performance_mode") for value in _values(report, key)), "")
    if not mode or mode.lower() in ("n/a", "not supported", "unknown"):
        return Check("npu power", "info", "unknown: xrt-smi does not tell", "`xrt-smi examine -r platform` shows it")
    if mode.lower() != "turbo":
        fix = "the fastest is turbo, which takes more power: sudo xrt-smi configure --pmode turbo"
        return Check("npu power", "warn" if mode.lower() == "powersaver" else "info", f"mode {mode}", fix)
    return Check("npu power", "ok", f"mode {mode}")


def _values(tree: Any, key: str) -> Iterator[Any]:
    """All values of a key, however deep: XRT moves them from release to release."""
    if isinstance(tree, dict):
        if key in tree:
            yield tree[key]
        tree = list(tree.values())
    if isinstance(tree, list):
        for part in tree:
            yield from _values(part, key)


# --- Python's binding ---------------------------------------------------------------------------


def other_pythons(root: Path = Path("/")) -> str:
    """Where a pyxrt for another Python lies, as a remark; "" if there is none."""
    folders = [*(root / "usr/lib").glob("python3*/dist-packages"), root / AMD_FOLDER.relative_to("/") / "python"]
    for folder in folders:
        for path in folder.glob("pyxrt.cpython-*.so"):
            tag = path.name.split("-")[1]
            if tag != f"{sys.version_info.major}{sys.version_info.minor}":
                return f"{path} is for Python {tag[0]}.{tag[1:]}, this is {platform.python_version()}"
    return ""
