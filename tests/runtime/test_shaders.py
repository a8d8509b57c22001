"""The checked-in SPIR-V is what the sources give, it is valid, and every build is in the catalogue."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from typing import Any

import pytest

from tests.scripts import ROOT, load


@pytest.fixture(scope="module")
def build() -> Any:
    return load(ROOT / "shaders" / "build.py")


def test_manifest_is_of_these_sources(build: Any) -> None:
    entries = build.manifest()
    assert set(entries) == set(build.builds()) == {path.stem for path in build.OUT.glob("*.spv")}
    for name, (source, defines) in build.builds().items():
        code = (build.OUT / f"{name}.spv").read_bytes()
        assert entries[name]["spirv"] == hashlib.sha256(code).hexdigest(), name
        assert entries[name]["source"] == build.source_hash(source, defines), f"{name}: run shaders/build.py"


def test_the_hash_covers_what_is_included(build: Any) -> None:
    files = {path.name for path in build._files(build.HERE / "ffn_w4g_gemv.comp")}
    assert files == {"ffn_w4g_gemv.comp", "gemv.glsl", "numbers.glsl", "dot.glsl", "w4g32.glsl"}


def test_compiling_again_gives_the_same_bytes(build: Any) -> None:
    if shutil.which(build.COMPILER) is None:
        pytest.skip("no glslangValidator (apt install glslang-tools)")
    wanted = {entry["compiler"] for entry in build.manifest().values()}
    if wanted != {build.compiler_version()}:
        pytest.skip(f"this is {build.compiler_version()}, the builds are by {', '.join(wanted)}: bytes differ")
    for name, (source, defines) in build.builds().items():
        assert build.compile_one(source, defines) == (build.OUT / f"{name}.spv").read_bytes(), name


def test_spirv_is_valid(build: Any) -> None:
    if shutil.which("spirv-val") is None:
        pytest.skip("no spirv-val (apt install spirv-tools)")
    for path in build.OUT.glob("*.spv"):
        done = subprocess.run(["spirv-val", "--target-env", build.TARGET, str(path)], capture_output=True, text=True)
        assert done.returncode == 0, f"{path.name}: {done.stdout}{done.stderr}"


def test_spirv_val_finds_an_error(build: Any, tmp_path: Any) -> None:
    if shutil.which("spirv-val") is None:
        pytest.skip("no spirv-val (apt install spirv-tools)")
    code = bytearray((build.OUT / "norm_add.spv").read_bytes())
    code[4 * 3] = 1  # the bound of ids
    (tmp_path / "broken.spv").write_bytes(code)
    assert subprocess.run(["spirv-val", str(tmp_path / "broken.spv")], capture_output=True).returncode != 0


def test_every_source_is_in_the_catalogue() -> None:
    catalogue = (ROOT / "shaders" / "README.md").read_text()
    for path in [*(ROOT / "shaders").glob("*.comp"), *(ROOT / "shaders").glob("include/*.glsl")]:
        assert path.name in catalogue
