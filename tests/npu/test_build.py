"""`kernels/build.py` and the artifacts it writes: found by every parameter, refused when anything is off."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from unicorn_backend import assets
from unicorn_backend.runtime.npu import artifacts, wanted
from unicorn_backend.runtime.npu.artifacts import KERNELS, Artifact
from unicorn_backend.runtime.npu.designs import Attention, Gemm, generation, key

DESIGN = Attention("npu1", 64, 16, 16, 2)


def build(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a Python that has no torch: an IRON environment need not have it."""
    code = f"import sys, runpy; sys.modules['torch'] = None; sys.argv = ['build.py', *{list(arguments)!r}]"
    code += f"; runpy.run_path({str(KERNELS / 'build.py')!r}, run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def make(root: Path) -> Artifact:
    def fill(folder: Path) -> None:
        (folder / artifacts.XCLBIN).write_bytes(b"xclbin2" * 99)

    return artifacts.write(root, DESIGN, "mlir-aie 1.0", fill)


def test_host_model_of_a_model_without_torch(tmp_path: Path) -> None:
    listed = build("list", str(assets.embedded_model()), "--target", "npu1")
    assert listed.returncode == 0, listed.stderr
    names = listed.stdout.split()
    assert len(names) == 3 and any("head_dim64" in name for name in names)
    done = build("attention", "--target", "npu2", "--head-dim", "64", "--host-model", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = artifacts.find(tmp_path / artifacts.EMULATED, wanted.attention("npu2", 64), emulated=True)
    assert isinstance(found, Artifact) and found.emulated
    found = artifacts.find(tmp_path / artifacts.EMULATED, wanted.attention("npu2", 64), emulated=False)
    assert "for the emulator" in str(found)


def test_messages(tmp_path: Path) -> None:
    no_tools = build("attention", "--target", "npu1", "--head-dim", "64", "--out", str(tmp_path))
    assert no_tools.returncode == 2 and "no IRON environment" in no_tools.stderr
    illegal = build("gemm", "--target", "npu1", "--k", "100", "--n", "256", "--out", str(tmp_path))
    assert illegal.returncode == 2 and "legal are the multiples of 128" in illegal.stderr
    assert not list(tmp_path.iterdir())


def test_damage_is_found(tmp_path: Path) -> None:
    """Truncated, changed, renamed, other sources, other version: a reason each, and never the artifact."""
    folder = make(tmp_path).folder
    assert isinstance(artifacts.find(tmp_path, DESIGN, emulated=False), Artifact)
    assert "build it with kernels/build.py" in str(artifacts.find(tmp_path, Gemm("npu1", 128, 256), emulated=False))

    manifest = json.loads((folder / artifacts.MANIFEST).read_text())
    for change, says in (
        ({"version": 0}, "version 0"),
        ({"design": {**manifest["design"], "blocks": 3}}, "holds another kernel"),
        ({"sources": "x"}, "built from other sources"),
        ({"built": artifacts.HOST_MODEL}, "for the emulator"),
    ):
        (folder / artifacts.MANIFEST).write_text(json.dumps(manifest | change))
        assert says in str(artifacts.find(tmp_path, DESIGN, emulated=False))
    (folder / artifacts.MANIFEST).write_text("{")
    assert "damaged" in str(artifacts.find(tmp_path, DESIGN, emulated=False))
    (folder / artifacts.MANIFEST).write_text(json.dumps(manifest))
    whole = (folder / artifacts.XCLBIN).read_bytes()
    (folder / artifacts.XCLBIN).write_bytes(whole[:-1])
    assert "truncated" in str(artifacts.find(tmp_path, DESIGN, emulated=False))

    other = dataclasses.replace(DESIGN, blocks=3)
    folder.rename(tmp_path / key(other))
    assert "holds another kernel" in str(artifacts.find(tmp_path, other, emulated=False))


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / artifacts.XCLBIN).write_bytes(b"half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        artifacts.write(tmp_path, DESIGN, "x", fail)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ("npu1", "npu2"))
@pytest.mark.parametrize("sizes", [(1152, 4, 1, 256), (2560, 8, 4, 256), (3840, 16, 8, 256), (5376, 32, 16, 128)])
def test_every_gemma_3_has_legal_designs(target: str, sizes: tuple[int, int, int, int]) -> None:
    """1B, 4B, 12B, 27B; a config without text_config and one with."""
    hidden, heads, kv_heads, dim = sizes
    text = {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": dim}
    found = wanted.of_model({"text_config": text}, target)
    assert found == wanted.of_model(text, target)
    qkv, out, core = found
    assert isinstance(qkv, Gemm) and qkv.k >= hidden and qkv.n >= (heads + 2 * kv_heads) * dim
    assert isinstance(out, Gemm) and out.k >= heads * dim and out.n >= hidden
    assert isinstance(core, Attention) and core.key_range == 512 and core.cores == 4 * generation(target).columns
