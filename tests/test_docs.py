"""README and docs say what is: tables equal their JSON, links lead somewhere, names are the code's."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

import unicorn_backend
from tests.scripts import ROOT, load
from unicorn_backend.options import Options

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")


def test_tables_equal_their_json() -> None:
    tables = load(ROOT / "benchmarks" / "tables.py")
    for path in tables.PAGES:
        text = path.read_text(encoding="utf-8")
        assert tables.BLOCK.search(text) and tables.render(text) == text, "run `make tables`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert not [link for link in links if not (page.parent / link).exists()]
    paths = re.findall(r"`((?:unicorn_backend|ops|docs|tests|examples|benchmarks)/[\w./-]*)`", text)
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_readme_lists_every_option_and_recipe() -> None:
    first_cells = set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE))
    assert {field.name for field in dataclasses.fields(Options)} <= first_cells
    assert set(unicorn_backend.recipes()) <= first_cells
