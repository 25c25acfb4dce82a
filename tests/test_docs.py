"""What is generated from the code is fresh, and every local link of the documents leads somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pdserve.models.supported import supported

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("script", ["make_metrics.py", "make_configuration.py"])
def test_generated_page_is_fresh(script: str) -> None:
    command = [sys.executable, f"docs/{script}", "--check"]
    found = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": "."}, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_models_page_says_what_is_supported() -> None:
    page = (ROOT / "docs" / "models.md").read_text().splitlines()
    rows = [
        f"| `{name}` | {text} |" if text else f"| `{name}` | |"
        for names in supported().values()
        for name, text in names.items()
    ]
    assert [row for row in rows if row not in page] == []
    assert sum(line.startswith("| `") for line in page) == len(rows)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_local_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_named_in_tables_exist(page: Path) -> None:
    for line in page.read_text().splitlines():
        if line.startswith("| `") and page.name == "README.md":
            for name in re.findall(r"`((?:router|pdserve|kvstore|tests|docs)/[\w/.]*)`", line.split("|")[1]):
                assert (ROOT / name).exists(), f"{page.name} names {name}"
