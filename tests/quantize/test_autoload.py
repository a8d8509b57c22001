"""transformers knows the quantizer without anyone importing this package, in every order of imports."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unicorn_backend.integration import autoload

ROOT = Path(__file__).parents[2]
KNOWN = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; print('unicorn' in m)"


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """Environment in which the entry point is installed, whether or not the package is."""
    info = tmp_path / "unicorn_backend-0.0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: unicorn-backend\nVersion: 0.0.1\n")
    (info / "entry_points.txt").write_text(
        "[torch.backends]\nunicorn_backend = unicorn_backend.integration.autoload:register\n"
    )
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}


def run(code: str, environment: dict[str, str]) -> str:
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_torch_is_enough(installed: dict[str, str]) -> None:
    code = f"import torch, sys; print('transformers' in sys.modules); {KNOWN}"
    assert run(code, installed).split() == ["False", "True"]


@pytest.mark.parametrize(
    "first",
    [
        "from transformers import AutoModelForCausalLM",
        "import transformers.quantizers.auto, transformers.modeling_utils",  # imports torch from inside the module
        "import unicorn_backend.integration.hf_quantizer",
    ],
)
def test_every_order_of_imports(first: str, installed: dict[str, str]) -> None:
    assert run(f"{first}; {KNOWN}", installed) == "True"


def test_switched_off_until_imported(installed: dict[str, str]) -> None:
    environment = {**installed, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    code = f"import torch, sys; print('unicorn_backend' in sys.modules); import unicorn_backend; {KNOWN}"
    assert run(code, environment).split() == ["False", "True"]


def test_registering_again_changes_nothing_and_is_quick() -> None:
    finders = list(sys.meta_path)
    autoload.register()
    start = time.perf_counter()
    autoload.register()
    assert time.perf_counter() - start < 5e-3
    assert [f for f in sys.meta_path if type(f).__name__ == "_Finder"] == [
        f for f in finders if type(f).__name__ == "_Finder"
    ]


def test_eager_model_runs_in_a_fresh_process(installed: dict[str, str]) -> None:
    """Without torch.compile nothing but quantizing loads the kernels."""
    code = (
        "import torch, unicorn_backend as u; m = torch.nn.Linear(64, 32);"
        "u.quantize(m, 'q4'); print(m(torch.zeros(1, 64)).shape[1])"
    )
    assert run(code, installed).split()[-1] == "32"
