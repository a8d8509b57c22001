"""`unicorn doctor`: what this machine has, what is missing, and how to fix it.

Each check is a function that returns a `Check`; `CHECKS` lists them in the order in which they are printed, before
those of the NPU, which are there as far as there is one.
`fail` means that the package does not work here; `warn` that it is slower than it could be, or that a device
stays unused.
"""

from __future__ import annotations

import ctypes.util
import glob
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import stat
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from unicorn_backend import assets, measure, table
from unicorn_backend.checks import Check
from unicorn_backend.errors import NativeLibraryError, OptionError
from unicorn_backend.generation.meter import bandwidth_gbps
from unicorn_backend.options import cache_folder, forced_isa, npu_folder
from unicorn_backend.partition import calibration
from unicorn_backend.runtime import open_device
from unicorn_backend.runtime.npu import machine

TESTED = {"torch": "2.13", "transformers": "5.24"}


def check_python() -> Check:
    return Check("python", "ok", f"{platform.python_version()} in {sys.prefix}")


def check_version(package: str) -> Check:
    tested = TESTED[package]
    found = importlib.metadata.version(package)
    if not found.startswith(f"{tested}."):
        fix = f"tested with {tested}; if something fails: pip install '{package}=={tested}.*'"
        return Check(package, "warn", found, fix)
    return Check(package, "ok", found)


def check_registration() -> Check:
    names = {e.name for e in importlib.metadata.entry_points(group="torch_dynamo_backends")}
    if "unicorn" not in names:
        fix = "install the package in this environment: pip install --no-build-isolation ."
        return Check("backend", "fail", "torch.compile does not know the backend 'unicorn'", fix)
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "0":
        fix = "unset TORCH_DEVICE_BACKEND_AUTOLOAD, or write `import unicorn_backend` before from_pretrained"
        return Check("backend", "warn", "registered, but saved checkpoints need an import first", fix)
    return Check("backend", "ok", "registered with torch.compile and transformers")


def check_native() -> Check:
    """Loads the library and compares one product with the plain-torch meaning of it."""
    try:
        path = assets.load_native()
    except NativeLibraryError as error:
        return Check("native library", "fail", str(error), "pip install --no-build-isolation --force-reinstall .")
    except OptionError as error:
        return Check("native library", "fail", str(error), "unset UNICORN_ISA")
    used = torch.ops.unicorn.set_isa(forced_isa())
    wrong, bound = _product_error()
    found = f"{used} of {', '.join(torch.ops.unicorn.isas())}; {path.name}"
    if not wrong <= bound:
        fix = "UNICORN_ISA=avx2 (or portable) selects other kernels; please report this with the CPU's name"
        return Check("native library", "fail", f"{found}; wrong result: error {wrong:.2e}, bound {bound:.2e}", fix)
    if used == "portable":
        return Check("native library", "warn", found, "this CPU has neither AVX2 nor AVX-512: expect slow generation")
    return Check("native library", "ok", f"{found}; agrees with the reference")


def _product_error() -> tuple[float, float]:
    """Largest error of a small INT4 linear, and its bound: fp32 rounding in each of the K / 32 sums."""
    from unicorn_backend import reference
    from unicorn_backend.quantize.schemes import quantize_weight

    generator = torch.Generator().manual_seed(0)
    n, k = 48, 256
    w = torch.randn(n, k, generator=generator)
    x = torch.randn(3, k, generator=generator)
    packed = quantize_weight(w, "w4g32")
    got = torch.ops.unicorn.linear(x, packed, None, n)
    bound = float((x.abs() @ w.abs().T).max()) * (k // 32) * 2**-23
    return float((got - reference.linear(x, packed, None, n)).abs().max()), bound


def check_cpu() -> Check:
    info = measure.provenance()
    cores = _physical_cores()
    kinds = _core_kinds()
    threads = torch.get_num_threads()
    found = f"{info['cpu']}; {cores} cores, {os.cpu_count()} threads; torch uses {threads}"
    if len(kinds) > 1:
        found += "; kinds: " + ", ".join(f"{count} up to {kind}" for kind, count in kinds.items())
    if threads > cores:
        return Check("cpu", "warn", found, f"two threads per core share its units: OMP_NUM_THREADS={cores}")
    return Check("cpu", "ok", found)


def _physical_cores() -> int:
    """Distinct cores among the processors that this process may use."""
    ids = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        ids.add(siblings.read_text().strip() if siblings.exists() else str(cpu))
    return len(ids)


def _core_kinds() -> Counter[str]:
    """Processors by their highest clock: a Ryzen AI CPU has full and dense cores."""
    kinds: Counter[str] = Counter()
    for path in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/cpuinfo_max_freq"):
        kinds[f"{int(path.read_text()) / 1e6:.1f} GHz"] += 1
    return kinds


def check_clock() -> Check:
    path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if not path.exists():
        return Check("clock", "info", "the system does not tell (a virtual machine?)")
    profile = Path("/sys/firmware/acpi/platform_profile")
    found = path.read_text().strip() + (f", profile {profile.read_text().strip()}" if profile.exists() else "")
    if "low-power" in found:
        return Check("clock", "warn", found, "powerprofilesctl set performance (or balanced)")
    return Check("clock", "ok", found)


def check_huge_pages() -> Check:
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not path.exists():
        return Check("huge pages", "warn", "not supported by this kernel", "use a kernel with transparent huge pages")
    mode = path.read_text().split("[")[1].split("]")[0]
    if mode == "never":
        return Check("huge pages", "warn", mode, f"echo madvise | sudo tee {path}")
    return Check("huge pages", "ok", mode)


def check_memory() -> Check:
    total, free = measure.ram()
    found = f"{table.size(free)} free of {table.size(total)}"
    if free < 2e9:
        return Check("memory", "warn", found, "close programs: a 1B model needs about 1 GB, a 4B model 3 GB")
    return Check("memory", "ok", found)


def check_bandwidth() -> Check:
    return Check(
        "bandwidth", "ok", f"{bandwidth_gbps():.1f} GB/s read; the ceiling of tokens/s is this over bytes per token"
    )


def check_cache() -> Check:
    folder = cache_folder()
    if folder is None:
        return Check("compile cache", "warn", "off (UNICORN_CACHE=0)", "unset UNICORN_CACHE: each start compiles again")
    if not folder.exists():
        parent = next(p for p in folder.parents if p.exists())
        if not os.access(parent, os.W_OK):
            return Check(
                "compile cache", "warn", f"{folder} cannot be made", "set UNICORN_CACHE_DIR to a folder of yours"
            )
        return Check("compile cache", "ok", f"{folder} (empty)")
    about = folder.stat()
    if about.st_uid != os.getuid() or stat.S_IMODE(about.st_mode) & 0o077:
        return Check("compile cache", "warn", f"{folder} is open to others, so unused", f"chmod 700 {folder}")
    files = [p for p in folder.rglob("*") if p.is_file()]
    return Check(
        "compile cache", "ok", f"{folder}: {len(files)} files, {table.size(sum(p.stat().st_size for p in files))}"
    )


def check_disk() -> Check:
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = next(p for p in (Path(HF_HUB_CACHE), *Path(HF_HUB_CACHE).parents) if p.exists())
    free = shutil.disk_usage(folder).free
    found = f"{table.size(free)} free at {HF_HUB_CACHE}"
    if free < 10e9:
        return Check("disk", "warn", found, "a 4B model in bf16 is 8 GB: free some space, or set HF_HOME elsewhere")
    return Check("disk", "ok", found)


def check_vulkan() -> Check:
    """The loader, the Python binding and its devices, each with its shader variant, self-test and memory."""
    if ctypes.util.find_library("vulkan") is None:
        return Check("vulkan", "info", "no loader", "sudo apt install libvulkan1 mesa-vulkan-drivers")
    nodes = glob.glob("/dev/dri/renderD*")
    locked = [node for node in nodes if not os.access(node, os.R_OK | os.W_OK)]
    if locked:
        return Check(
            "vulkan", "warn", f"{locked[0]} is not yours to use", "sudo usermod -aG render,video $USER; log in again"
        )
    if importlib.util.find_spec("vulkan") is None:
        found = f"loader present, {len(nodes)} render nodes; devices not listed without the Python binding"
        return Check("vulkan", "info", found, "pip install vulkan")
    from unicorn_backend.runtime.vulkan import api, physical

    try:
        devices, trouble = physical.devices(), ""
    except api.VulkanError as error:
        devices, trouble = [], f" ({error})"
    if not devices:
        return Check(
            "vulkan", "warn", f"the loader finds no working driver{trouble}", "sudo apt install mesa-vulkan-drivers"
        )
    found = "; ".join(_vulkan_device(number, device) for number, device in enumerate(devices))
    if all(device.kind == "software" for device in devices):
        return Check(
            "vulkan", "info", f"{found}: no GPU", "a software driver computes on the CPU; it is of no use here"
        )
    return Check("vulkan", "ok", found)


def _vulkan_device(number: int, physical: Any) -> str:
    """A device's name and kind, and the result of opening it, which compares small regions with the CPU's."""
    shown = f"{physical.name} ({physical.kind})"
    assets.load_native()
    device: Any = open_device(f"vulkan:{number}")
    if isinstance(device, str):
        return f"{shown}: {device}"
    budget = device.memory().budget
    memory = f", {table.size(budget)} to be had" if budget else ""
    over = f" ({device.passed_over})" if device.passed_over else ""
    return f"{shown}: shaders {device.variant.name}{over}, self-test of {device.takes} passed{memory}"


def check_calibration() -> Check:
    """Whether predictions come from this machine, and how old they are."""
    fix = "unicorn calibrate (30 s): placement and explain go by estimates without it"
    try:
        about = calibration.identity()
    except NativeLibraryError:
        return Check("calibration", "info", "not without the native library")
    found = calibration.load("cpu", about)
    if found is None:
        return Check("calibration", "info", f"none for {about['threads']} threads, {about['isa']}", fix)
    age = f"{about['threads']} threads, {about['isa']}: {found.age_s / 86400:.0f} days old"
    return Check("calibration", "ok", f"{age}, memory read {found.rates['read_gbps']:.1f} GB/s")


def check_npu() -> list[Check]:
    """Everything from the PCI bus to a context that is free, as far as it is there."""
    checks = machine.examine()
    if any(check.status != "ok" for check in checks):
        return checks
    return [*checks, check_xrt(), *machine.ask_xrt()]


def check_xrt() -> Check:
    """How the NPU is reached: through which binding, by runlists or single runs."""
    from unicorn_backend.runtime.npu.xrt import find_xrt

    found = find_xrt(npu_folder())
    if isinstance(found, str):
        other = machine.other_pythons()
        fix = "kernels/build.py wrapper serves any Python; or the distribution's Python with python3-xrt"
        return Check("xrt", "warn", f"{found}; {other}" if other else found, fix)
    return Check("xrt", "ok", found.label)


CHECKS: tuple[Callable[[], Check], ...] = (
    check_python,
    lambda: check_version("torch"),
    lambda: check_version("transformers"),
    check_registration,
    check_native,
    check_cpu,
    check_clock,
    check_huge_pages,
    check_memory,
    check_bandwidth,
    check_calibration,
    check_cache,
    check_disk,
    check_vulkan,
)


def examine() -> list[Check]:
    """Run every check."""
    return [*(check() for check in CHECKS), *check_npu()]


def to_json(checks: list[Check]) -> dict[str, Any]:
    return {"ok": all(c.status != "fail" for c in checks), "checks": [asdict(c) for c in checks]}


def as_table(checks: list[Check]) -> Table:
    """For a terminal; a fix stands below what was found."""
    colours = {"ok": "green", "info": "blue", "warn": "yellow", "fail": "red"}
    grid = Table.grid(padding=(0, 2))
    for check in checks:
        text = Text(check.found)
        if check.fix:
            text.append(f"\n-> {check.fix}", style="dim")
        grid.add_row(Text(check.status, style=colours[check.status]), check.name, text)
    return grid
