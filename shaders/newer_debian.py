#!/usr/bin/env python3
"""Vulkan drivers, checkers and the shader compiler of newer Debian releases, unpacked and not installed.

    python3 shaders/newer_debian.py       into build/vulkan/: trixie and forky, 150 MB to fetch, seconds

Cooperative matrices are unknown to Debian 12's compiler, checker and drivers. Debian 13 (trixie) has a compiler and a
RADV that compile them, the one after it (forky) a software driver that runs them and a validation layer that knows
their specialization constants. Their programs need that release's C library: `command` starts them with it.
Needs apt-get and dpkg, but not root.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent / "build" / "vulkan"
LIBRARIES = "usr/lib/x86_64-linux-gnu"
KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"
PACKAGES = {
    "trixie": "libvulkan1 mesa-vulkan-drivers spirv-tools glslang-tools",
    "forky": "libvulkan1 mesa-vulkan-drivers vulkan-validationlayers",
}
INSTALL = "python3 shaders/newer_debian.py"


def root(suite: str) -> Path | None:
    """Where a release is unpacked; None if it is not."""
    found = ROOT / suite
    return found if (found / ".packages").is_file() else None


def command(suite: str, program: str) -> list[str]:
    """What starts `program`, one of the release or of this system, with the release's libraries."""
    libraries = ROOT / suite / LIBRARIES
    own = ROOT / suite / "usr/bin" / program
    path = str(own) if own.is_file() else program
    return [str(libraries / "ld-linux-x86-64.so.2"), "--library-path", str(libraries), "--argv0", path, path]


def driver(suite: str, name: str) -> str:
    """Path of the description of a release's driver: "lvp", "radeon"."""
    folder = ROOT / suite / "usr/share/vulkan/icd.d"
    return str(next(iter(sorted(folder.glob(f"{name}_icd*.json"))), folder / f"{name}_icd.json"))


def layers(suite: str) -> str:
    """Folder of the descriptions of a release's validation layers."""
    return str(ROOT / suite / "usr/share/vulkan/explicit_layer.d")


def main() -> None:
    if missing := [tool for tool in ("apt-get", "dpkg") if shutil.which(tool) is None]:
        sys.exit(f"no {missing[0]}: this is for Debian and what comes from it")
    for suite, packages in PACKAGES.items():
        if root(suite) is None or (ROOT / suite / ".packages").read_text() != packages:
            _unpack(suite, packages)
        print(f"{suite}: {ROOT / suite}")


def _unpack(suite: str, packages: str) -> None:
    """Packages and all they depend on, as if nothing were installed."""
    work = ROOT / f"{suite}.new"
    shutil.rmtree(work, ignore_errors=True)
    for folder in ("apt/lists/partial", "apt/cache/archives/partial"):
        (work / folder).mkdir(parents=True)
    (work / "apt/status").touch()
    release, mirror = suite.split("-")[0], _mirror()
    sources = [f"deb [arch=amd64 signed-by={KEYS}] {mirror} {name} main\n" for name in dict.fromkeys((release, suite))]
    (work / "apt/sources.list").write_text("".join(sources))
    settings = {
        "APT::Architecture": "amd64",
        "APT::Install-Recommends": "false",
        "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled": "false",
        "Debug::NoLocking": "true",
        "Dir::Cache": work / "apt/cache",
        "Dir::Etc::sourcelist": work / "apt/sources.list",
        "Dir::Etc::sourceparts": "/nonexistent",
        "Dir::State::lists": work / "apt/lists",
        "Dir::State::status": work / "apt/status",
    }
    apt = ["apt-get", "-qq", "-t", suite, *(f"-o{name}={value}" for name, value in settings.items())]
    subprocess.run([*apt, "update"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([*apt, "install", "--download-only", "-y", *packages.split()], check=True, stdout=subprocess.DEVNULL)
    for package in sorted((work / "apt/cache/archives").glob("*.deb")):
        subprocess.run(["dpkg", "-x", package, work], check=True)
    shutil.rmtree(work / "apt")
    (work / ".packages").write_text(packages)
    shutil.rmtree(ROOT / suite, ignore_errors=True)
    work.rename(ROOT / suite)


def _mirror() -> str:
    """Debian's, as apt has it on this machine."""
    command = ["apt-get", "indextargets", "--format", "$(LABEL) $(REPO_URI)"]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    found = next((line.removeprefix("Debian ") for line in lines if line.startswith("Debian ")), None)
    if found is None:
        raise SystemExit("apt has no archive of Debian's on this machine: add one to its sources, then apt-get update")
    return found


if __name__ == "__main__":
    main()
