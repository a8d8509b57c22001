#!/usr/bin/env python3
"""Compile every shader variant to unicorn_backend/runtime/vulkan/spirv/ and write the manifest of their hashes.

    python shaders/build.py            compile all
    python shaders/build.py --check    compile into memory and compare with what is checked in

Needs glslangValidator (Debian: apt install glslang-tools). Users need no compiler: the .spv files are checked in.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
OUT = HERE.parent / "unicorn_backend" / "runtime" / "vulkan" / "spirv"
COMPILER = "glslangValidator"
TARGET = "vulkan1.2"


def builds() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Name of the .spv -> (source, defines)."""
    found: dict[str, tuple[str, tuple[str, ...]]] = {name: (name, ()) for name in ("norm_quant", "norm_add", "heads")}
    products = (("ffn_w4g", "gate_up", ("GATE_UP",)), ("ffn_w4g", "down", ()), ("linear_w8", "", ()))
    for source, which, defines in products:
        for dot, dots in (("dot8", ("DOT8",)), ("int", ())):
            what = "_".join(filter(None, (which, dot)))
            found[f"{source}_gemm__{what}"] = (f"{source}_gemm", (*defines, *dots))
            for sums, subgroup in (("subgroup", ("SUBGROUP",)), ("shared", ())):
                found[f"{source}_gemv__{what}_{sums}"] = (f"{source}_gemv", (*defines, *dots, *subgroup))
    return found


def source_hash(source: str, defines: tuple[str, ...]) -> str:
    """sha256 of the shader, what it includes, and its defines."""
    digest = hashlib.sha256(" ".join((TARGET, *defines)).encode())
    for path in _files(HERE / f"{source}.comp"):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def compile_one(source: str, defines: tuple[str, ...]) -> bytes:
    """SPIR-V of one build. Raises CalledProcessError with the compiler's words."""
    with tempfile.NamedTemporaryFile(suffix=".spv") as file:
        arguments = [COMPILER, "-V", "--target-env", TARGET, *(f"-D{name}" for name in defines)]
        command = [*arguments, "-o", file.name, str(HERE / f"{source}.comp")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        return Path(file.name).read_bytes()


def compiler_version() -> str:
    """Same compiler, same bytes; other versions differ."""
    text = subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True).stdout
    return f"glslang {text.splitlines()[0].removeprefix('Glslang Version: ')}"


def manifest() -> dict[str, dict[str, str]]:
    entries: dict[str, dict[str, str]] = json.loads((OUT / "manifest.json").read_text())["builds"]
    return entries


def _files(path: Path) -> list[Path]:
    names = re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE)
    return [path, *(file for name in names for file in _files(HERE / name))]


def _build() -> None:
    OUT.mkdir(exist_ok=True)
    entries = {}
    for name, (source, defines) in builds().items():
        code = compile_one(source, defines)
        (OUT / f"{name}.spv").write_bytes(code)
        hashes = {"source": source_hash(source, defines), "spirv": hashlib.sha256(code).hexdigest()}
        entries[name] = {**hashes, "compiler": compiler_version()}
    for stale in OUT.glob("*.spv"):
        if stale.stem not in entries:
            stale.unlink()
    (OUT / "manifest.json").write_text(json.dumps({"builds": entries}, indent=1) + "\n")
    print(f"{len(entries)} builds in {OUT}")


def _check() -> int:
    wrong = [name for name, build in builds().items() if compile_one(*build) != (OUT / f"{name}.spv").read_bytes()]
    print(f"not as {compiler_version()} compiles them: {', '.join(wrong)}" if wrong else "all builds are as compiled")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(_check() if sys.argv[1:] == ["--check"] else _build())
