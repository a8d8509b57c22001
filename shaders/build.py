#!/usr/bin/env python3
"""Compile every shader variant to unicorn_backend/runtime/vulkan/spirv/ and write the manifest of their hashes.

    python shaders/build.py            compile all
    python shaders/build.py --check    compile into memory and compare with what is checked in

Needs glslangValidator (Debian: apt install glslang-tools), and a newer one for cooperative matrices
(python3 shaders/newer_debian.py). Users need no compiler: the .spv files are checked in.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import newer_debian  # noqa: E402

OUT = HERE.parent / "unicorn_backend" / "runtime" / "vulkan" / "spirv"
COMPILER = "glslangValidator"
NEWER = "trixie"  # whose compiler and checker know cooperative matrices
TARGET = "vulkan1.2"


def builds() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Name of the .spv -> (source, defines)."""
    found: dict[str, tuple[str, tuple[str, ...]]] = {
        name: (name, ()) for name in ("norm_quant", "norm_add", "heads", "copy")
    }
    products = (("ffn_w4g", "gate_up", ("GATE_UP",)), ("ffn_w4g", "down", ()), ("linear_w8", "", ()))
    for source, which, defines in products:
        for block, blocks in (("", ()), ("large", ("LARGE",))):
            what = "_".join(filter(None, (which, block)))
            found["__".join(filter(None, (f"{source}_gemm_matrix", what)))] = (
                f"{source}_gemm_matrix",
                (*defines, *blocks),
            )
        for dot, dots in (("dot8", ("DOT8",)), ("int", ())):
            what = "_".join(filter(None, (which, dot)))
            found[f"{source}_gemm__{what}"] = (f"{source}_gemm", (*defines, *dots))
            for sums, subgroup in (("subgroup", ("SUBGROUP",)), ("shared", ())):
                found[f"{source}_gemv__{what}_{sums}"] = (f"{source}_gemv", (*defines, *dots, *subgroup))
    return found


def source_hash(source: str, defines: tuple[str, ...]) -> str:
    """sha256 of the shader, what it includes, and its defines."""
    digest = hashlib.sha256(" ".join((TARGET, *defines)).encode())
    for path in _sources(source):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def compile_one(source: str, defines: tuple[str, ...]) -> bytes:
    """SPIR-V of one build. Raises CalledProcessError with the compiler's words."""
    with tempfile.NamedTemporaryFile(suffix=".spv") as file:
        arguments = [*tool(COMPILER, source), "-V", "--target-env", TARGET, *(f"-D{name}" for name in defines)]
        command = [*arguments, "-o", file.name, str(HERE / f"{source}.comp")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        return Path(file.name).read_bytes()


def tool(name: str, source: str) -> list[str]:
    """What starts the compiler or the checker for a source; [] if it is not here."""
    if source.endswith("_matrix"):
        return newer_debian.command(NEWER, name) if newer_debian.root(NEWER) else []
    return [name] if shutil.which(name) else []


def how_to_get(source: str) -> str:
    """The tools that `tool` does not find."""
    matrix = source.endswith("_matrix")
    return newer_debian.INSTALL if matrix else "apt install glslang-tools spirv-tools"


def compiler_version(source: str) -> str:
    """Same compiler, same bytes; other versions differ. "" if it is not here."""
    found = tool(COMPILER, source)
    if not found:
        return ""
    text = subprocess.run([*found, "--version"], capture_output=True, text=True, check=True).stdout
    return f"glslang {text.splitlines()[0].removeprefix('Glslang Version: ')}"


def at_hand() -> dict[str, str]:
    """Build -> "" if the compiler of the manifest is here, else why it cannot be compared."""
    versions = {source: compiler_version(source) for source, _ in builds().values()}
    found = {}
    for name, (source, _) in builds().items():
        wanted, have = manifest()[name]["compiler"], versions[source]
        other = f"this is {have}, the build is by {wanted}: bytes differ" if have != wanted else ""
        found[name] = other if have else f"no {wanted} ({how_to_get(source)})"
    return found


def manifest() -> dict[str, dict[str, str]]:
    entries: dict[str, dict[str, str]] = json.loads((OUT / "manifest.json").read_text())["builds"]
    return entries


def _sources(source: str) -> list[Path]:
    return _files(HERE / f"{source}.comp")


def _files(path: Path) -> list[Path]:
    names = re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE)
    return [path, *(file for name in names for file in _files(HERE / name))]


def _build() -> None:
    OUT.mkdir(exist_ok=True)
    entries = {}
    versions = {source: compiler_version(source) for source, _ in builds().values()}
    if missing := [how_to_get(source) for source, version in versions.items() if not version]:
        sys.exit(f"no compiler for all shaders: {missing[0]}")
    for name, (source, defines) in builds().items():
        code = compile_one(source, defines)
        (OUT / f"{name}.spv").write_bytes(code)
        hashes = {"source": source_hash(source, defines), "spirv": hashlib.sha256(code).hexdigest()}
        entries[name] = {**hashes, "compiler": versions[source]}
    for stale in OUT.glob("*.spv"):
        if stale.stem not in entries:
            stale.unlink()
    (OUT / "manifest.json").write_text(json.dumps({"builds": entries}, indent=1) + "\n")
    print(f"{len(entries)} builds in {OUT}")


def _check() -> int:
    wrong = []
    for name, trouble in at_hand().items():
        if trouble:
            print(f"{name}: not compared: {trouble}")
        elif compile_one(*builds()[name]) != (OUT / f"{name}.spv").read_bytes():
            wrong.append(name)
    print(f"not as their sources compile: {', '.join(wrong)}" if wrong else "no build differs from its sources")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(_check() if sys.argv[1:] == ["--check"] else _build())
