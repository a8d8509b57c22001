"""The Khronos validation layer over whole runs, with synchronization and GPU-assisted checks, and what it must find."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime import drivers
from tests.scripts import ROOT

LAYER = Path("/usr/share/vulkan/explicit_layer.d/VkLayer_khronos_validation.json")
SYNC, ASSISTED = (f"VK_VALIDATION_FEATURE_ENABLE_{name}_EXT" for name in ("SYNCHRONIZATION_VALIDATION", "GPU_ASSISTED"))


def messages(driver: str, scenario: list[str], tmp_path: Path, enabled: str) -> str:
    """What the layer reports about a scenario, which must come to its end."""
    if not LAYER.is_file():
        pytest.skip("no validation layer (apt install vulkan-validationlayers)")
    pytest.importorskip("vulkan", reason="no Python package 'vulkan'", exc_type=(ImportError, OSError))
    report = tmp_path / "report.txt"
    env = drivers.environment(driver) | layer_environment(tmp_path, report, {"enables": enabled})
    command = [sys.executable, "-m", "tests.runtime.vulkan_scenario", *scenario]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.stdout.endswith("done\n"), done.stdout + done.stderr
    return report.read_text() if report.exists() else ""


def layer_environment(tmp_path: Path, report: Path, enables: dict[str, str]) -> dict[str, str]:
    """What turns the layer on and makes it write to `report`; `enables`: settings, which change with its version."""
    settings = {
        **enables,
        "debug_action": "VK_DBG_LAYER_ACTION_LOG_MSG",
        "report_flags": "error,warn,perf",
        "log_filename": str(report),
        "duplicate_message_limit": "2",
    }
    file = tmp_path / "vk_layer_settings.txt"
    file.write_text("".join(f"khronos_validation.{name} = {value}\n" for name, value in settings.items()))
    return {
        "VK_LAYER_SETTINGS_PATH": str(file),
        "VK_INSTANCE_LAYERS": "VK_LAYER_KHRONOS_validation",
        "UNICORN_CACHE": "0",
    }


def test_no_messages_on_llvmpipe(tmp_path: Path) -> None:
    assert messages("llvmpipe", ["clean", "own"], tmp_path, f"{SYNC},{ASSISTED}") == ""


def test_no_messages_on_swiftshader(tmp_path: Path) -> None:
    found = messages("SwiftShader", ["clean", "mapped", "staged"], tmp_path, f"{SYNC},{ASSISTED}")
    own = "shaderInt64 feature is not available.  No buffer device address checking"  # which no shader here would need
    assert [line for line in found.splitlines() if not line.startswith("    ") and own not in line] == []


@pytest.mark.parametrize("driver", list(drivers.DRIVERS))
def test_a_missing_barrier_and_a_read_out_of_bounds_are_found(driver: str, tmp_path: Path) -> None:
    found = messages(driver, ["wrong"], tmp_path, f"{SYNC},{ASSISTED}")
    assert "SYNC-HAZARD-READ-AFTER-WRITE" in found
    assert "access out of bounds" in found


def test_gfx1103(tmp_path: Path) -> None:
    """Mesa's compiler on every pipeline for the Radeon 780M, without one: see shaders/isa.py."""
    newer = drivers.newer_debian()
    if newer.root("trixie") is None and not Path("/usr/share/vulkan/icd.d/radeon_icd.x86_64.json").is_file():
        pytest.skip(f"no RADV driver ({newer.INSTALL}, or apt install mesa-vulkan-drivers)")
    pytest.importorskip("vulkan", reason="no Python package 'vulkan'", exc_type=(ImportError, OSError))
    command = [sys.executable, "shaders/isa.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    if done.returncode and newer.root("trixie") is None:
        pytest.skip("this Mesa compiles for no gfx1103")
    assert done.returncode == 0, done.stderr
    found, record = json.loads(done.stdout), json.loads((ROOT / "shaders" / "gfx1103.json").read_text())
    same = found["driver"] == record["driver"]
    assert not same or found == record, "run shaders/isa.py --write"
    # Debian 12's Mesa knows no cooperative matrices
    assert set(found["pipelines"]) >= {name for name in record["pipelines"] if "matrix" not in name}
    for name, facts in found["pipelines"].items():
        build = next(b for b in ("matrix", "dot8", "int", "norm", "heads") if b in name.replace("_", " ").split())
        if build != "int" or same:  # which gfx1103 does not run; they spill with an older Mesa
            assert facts["spilled_vgprs"] == facts["spilled_sgprs"] == facts["scratch_"] == 0, name
        most = 160 if build == "matrix" else 128
        assert facts["vgprs"] <= (256 if build == "int" or name.endswith("large") else most), name
        assert facts["lds_bytes"] <= (28 if build == "matrix" else 16) << 10, name
        assert (facts["v_wmma"] > 0) == (build == "matrix"), name
        assert (facts["v_dot4"] > 0) == (build == "dot8" or "w8a gemm matrix" in name), name
