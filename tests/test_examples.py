"""Every example runs, on the embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.scripts import ROOT, load

EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))


def example(name: str) -> Any:
    return load(EXAMPLES / f"{name}.py")


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name: str, tmp_path: Path) -> None:
    extra = [str(tmp_path / "out")] if name == "quantize_checkpoint" else []
    assert example(name).main(["--tiny", *extra]).strip()


def test_27b_saves_and_reloads(tmp_path: Path) -> None:
    main, out = example("gemma3_27b").main, str(tmp_path / "packed")
    assert main(["--tiny", "--save", out]) == main(["--model", out])


def test_every_example_says_how_to_run_it() -> None:
    for name in SCRIPTS:
        assert f"python examples/{name}.py" in (example(name).__doc__ or "")


def test_notebook(tmp_path: Path) -> None:
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    text = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    assert "The film is a" in text and "int4_ffn" in text


def test_notebook_is_committed_without_outputs() -> None:
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
