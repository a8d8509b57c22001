"""What an NPU needs on this machine, and what to do where it is missing."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from pathlib import Path

PCI = {"0x1502": "npu1", "0x17f0": "npu2"}
MEMLOCK_BYTES = 64 << 20  # below it XRT's first buffer fails with err=-11


@dataclass(frozen=True)
class Check:
    name: str
    ok: bool
    text: str  # what was found, and what to do if that is not enough


def checks(root: Path = Path("/")) -> list[Check]:
    """From the bottom up; each makes sense only if those before it are fine. `root`: for tests."""
    return [_pci(root), _driver(root), _node(root), _memlock()]


def first_problem(root: Path = Path("/")) -> str:
    """The text of the first check that fails, "" if none does."""
    return next((check.text for check in checks(root) if not check.ok), "")


def _pci(root: Path) -> Check:
    for device in sorted((root / "sys/bus/pci/devices").glob("*")):
        vendor, number = (_read(device / name) for name in ("vendor", "device"))
        if vendor == "0x1022" and number in PCI:
            return Check("PCI device", True, f"{device.name} is {PCI[number]}")
    return Check(
        "PCI device",
        False,
        "no AMD NPU on the PCI bus (1022:1502 or 1022:17f0); if this chip has one, enable IPU in the BIOS",
    )


def _driver(root: Path) -> Check:
    if (root / "sys/bus/pci/drivers/amdxdna").is_dir():
        return Check("kernel module", True, "amdxdna is loaded")
    return Check("kernel module", False, "amdxdna is not loaded: it needs Linux 6.14 or newer, then `modprobe amdxdna`")


def _node(root: Path) -> Check:
    nodes = sorted((root / "dev/accel").glob("accel*"))
    if not nodes:
        return Check("device node", False, "no /dev/accel/accel0: is the firmware there? `dmesg | grep amdxdna` says")
    if not any(os.access(node, os.R_OK | os.W_OK) for node in nodes):
        return Check("device node", False, f"{nodes[0]} is not yours to use: add yourself to the group `render`")
    return Check("device node", True, str(nodes[0]))


def _memlock() -> Check:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY or limit >= MEMLOCK_BYTES:
        return Check("locked memory", True, "unlimited" if limit == resource.RLIM_INFINITY else f"{limit >> 20} MiB")
    return Check(
        "locked memory",
        False,
        f"only {limit >> 20} MiB may be locked, {MEMLOCK_BYTES >> 20} MiB are needed: put "
        "`* - memlock unlimited` into /etc/security/limits.d/npu.conf and log in again",
    )


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
