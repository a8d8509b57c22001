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
    files = {path.name for path in build._sources("ffn_w4g_gemv")}
    assert files == {"ffn_w4g_gemv.comp", "gemv.glsl", "numbers.glsl", "dot.glsl", "w4g32.glsl"}


def test_a_newer_compiler_is_asked_for_where_it_is_needed(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for source, _ in build.builds().values():
        text = "".join(path.read_text() for path in build._sources(source))
        assert ("GL_KHR_cooperative_matrix" in text) == source.endswith("_matrix")
    monkeypatch.setattr(build.newer_debian, "ROOT", ROOT / "nowhere")
    missing = build.at_hand()["linear_w8_gemm_matrix"]
    assert "no glslang 11:15" in missing and "python3 shaders/newer_debian.py" in missing


@pytest.mark.parametrize("matrix", [False, True])
def test_compiling_again_gives_the_same_bytes(build: Any, matrix: bool) -> None:
    trouble = {name: why for name, why in build.at_hand().items() if name in names(build, matrix)}
    if any(trouble.values()):
        pytest.skip("; ".join(sorted(set(trouble.values()))))
    for name in trouble:
        assert build.compile_one(*build.builds()[name]) == (build.OUT / f"{name}.spv").read_bytes(), name


@pytest.mark.parametrize("matrix", [False, True])
def test_spirv_is_valid(build: Any, matrix: bool) -> None:
    for name in names(build, matrix):
        source, _ = build.builds()[name]
        check = build.tool("spirv-val", source) or pytest.skip(f"no spirv-val ({build.how_to_get(source)})")
        command = [*check, "--target-env", build.TARGET, str(build.OUT / f"{name}.spv")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"


def names(build: Any, matrix: bool) -> list[str]:
    """Builds with cooperative matrices, or the others."""
    return [name for name, (source, _) in build.builds().items() if source.endswith("_matrix") == matrix]


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
