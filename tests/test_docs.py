"""What is generated from the code is fresh, links lead somewhere, and commands and options that are named exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pdserve.cli.bench import BENCHMARKS
from pdserve.models.supported import supported
from tests.support.documented import PAGES, ROOT, blocks


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


def test_every_block_says_what_it_is() -> None:
    """Or a command in it would not be run by tests/e2e/test_documentation.py."""
    assert {block.language for block in blocks()} <= {"sh", "python", "toml", "text"}
    assert [str(block) for block in blocks() if block.language == "text" and "pdserve " in block.text] == []


def mentions() -> set[tuple[str, str]]:
    """(page, command) of all shell blocks and all code within sentences and tables."""
    found = {(block.page, line) for block in blocks("sh") for line in block.text.replace("\\\n", " ").splitlines()}
    for page in PAGES:
        prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        found |= {(page.name, code) for code in re.findall(r"`([^`\n]+)`", prose)}
    return {(page, text.partition(" #")[0].strip()) for page, text in found}


def reference() -> dict[str, set[str]]:
    """The options of each command, by the generated reference."""
    sections = (ROOT / "docs" / "configuration.md").read_text().split("\n## ")[1:]
    return {text.partition("\n")[0]: set(re.findall(r"`(--[\w-]+)`", text)) for text in sections}


def test_commands_that_are_named_exist() -> None:
    known, wrong = reference(), []
    assert "--prefill" in known["pdserve up"]
    for page, text in mentions():
        command, _, of_workers = text.partition(" -- ")
        words = command.split()
        if page == "CHANGELOG.md" or words[:1] != ["pdserve"] or len(words) < 2 or not re.fullmatch("[a-z]+", words[1]):
            continue
        if words[1] in ("bench", "replay"):  # which pass their options on
            if words[1] == "bench" and words[2:3] not in ([], ["NAME"]) and words[2] not in BENCHMARKS:
                wrong.append((page, text))
            continue
        name = " ".join(words[: 3 if words[1] == "kv" else 2])
        if name == "pdserve kv":
            continue
        options = set(re.findall(r"--[\w-]+", command)) - {"--help"}
        of_workers_options = set(re.findall(r"--[\w-]+", of_workers))
        if name not in known or options - known[name] or of_workers_options - known["pdserve worker"]:
            wrong.append((page, text))
    assert wrong == []


def test_targets_of_make_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {text.split()[1] for _, text in mentions() if re.match(r"make [a-z]", text)}
    assert "serve" in named
    assert named <= targets
