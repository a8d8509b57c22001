"""The Khronos validation layer over whole runs, with synchronization and GPU-assisted checks, and what it must find."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

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
    settings = {
        "enables": enabled,
        "debug_action": "VK_DBG_LAYER_ACTION_LOG_MSG",
        "report_flags": "error,warn,perf",
        "log_filename": str(report),
        "duplicate_message_limit": "2",
    }
    file = tmp_path / "vk_layer_settings.txt"
    file.write_text("".join(f"khronos_validation.{name} = {value}\n" for name, value in settings.items()))
    env = drivers.environment(driver) | {
        "VK_LAYER_SETTINGS_PATH": str(file),
        "VK_INSTANCE_LAYERS": "VK_LAYER_KHRONOS_validation",
        "UNICORN_CACHE": "0",
    }
    command = [sys.executable, "-m", "tests.runtime.vulkan_scenario", *scenario]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.stdout.endswith("done\n"), done.stdout + done.stderr
    return report.read_text() if report.exists() else ""


def test_no_messages_on_llvmpipe(tmp_path: Path) -> None:
    assert messages("llvmpipe", ["clean", "own"], tmp_path, f"{SYNC},{ASSISTED}") == ""


def test_no_messages_on_swiftshader(tmp_path: Path) -> None:
    assert messages("SwiftShader", ["clean", "mapped", "staged"], tmp_path, SYNC) == ""


def test_a_missing_barrier_and_a_read_out_of_bounds_are_found(tmp_path: Path) -> None:
    found = messages("llvmpipe", ["wrong"], tmp_path, f"{SYNC},{ASSISTED}")
    assert "SYNC-HAZARD-READ-AFTER-WRITE" in found
    assert "access out of bounds" in found


def test_gfx1103(tmp_path: Path) -> None:
    """Mesa's compiler on every pipeline for the Radeon 780M, without one: see shaders/isa.py."""
    radv = Path("/usr/share/vulkan/icd.d/radeon_icd.x86_64.json")
    if not radv.is_file():
        pytest.skip("no RADV driver (apt install mesa-vulkan-drivers)")
    pytest.importorskip("vulkan", reason="no Python package 'vulkan'", exc_type=(ImportError, OSError))
    found = next((f for family in ("phoenix", "gfx1103_r1") if (f := _compile(radv, family))), None)
    if found is None:
        pytest.skip("this Mesa knows no gfx1103")
    record = json.loads((ROOT / "shaders" / "gfx1103.json").read_text())
    assert set(found["pipelines"]) == set(record["pipelines"])
    if found["driver"] == record["driver"]:
        assert found == record, "run shaders/isa.py --write"
    for name, facts in found["pipelines"].items():
        chosen = "int" not in name.replace("_", " ").split()  # what gfx1103 runs; the other builds may spill
        assert not chosen or facts["spilled_vgprs"] == facts["spilled_sgprs"] == facts["scratch_"] == 0, name
        assert facts["vgprs"] <= 128 and facts["lds_bytes"] <= 16 << 10, name
        assert (facts["v_dot4"] > 0) == ("dot8" in name), name


def _compile(radv: Path, family: str) -> Any:
    env = drivers.only(str(radv)) | {"RADV_FORCE_FAMILY": family}
    command = [sys.executable, "shaders/isa.py"]
    done = subprocess.run(
        command, cwd=ROOT, env={**env, "UNICORN_CACHE": "0"}, capture_output=True, text=True, timeout=600
    )
    return json.loads(done.stdout) if done.returncode == 0 else None
