"""The commands that README and docs show: every line of their `sh` and `python` blocks."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Generated pages have tests of their own.
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """`language` is what stands behind the opening fence."""

    page: str
    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """Of a shell block: one for each that a reader would type, comments left out."""
        found, begun = [], ""
        for line in self.text.splitlines():
            begun += line + "\n"
            if not begun.strip().startswith("#") and (not _closed(begun) or line.endswith("\\")):
                continue
            if words := shlex.split(begun, comments=True):
                found.append(_uncommented(begun) if words else "")
            begun = ""
        assert not begun, f"{self.page}: {begun!r} has no end"
        return found


def blocks(path: Path) -> list[Block]:
    return [Block(path.name, language, text) for language, text in _BLOCK.findall(path.read_text())]


def _closed(text: str) -> bool:
    try:
        shlex.split(text, comments=True)
    except ValueError:
        return False
    return True


def _uncommented(text: str) -> str:
    """Our comments stand behind at least two spaces or at the start of a line."""
    return re.sub(r"(^|\s{2,})#[^\n]*", "", text).strip()
