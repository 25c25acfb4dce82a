"""The blocks that README and docs show."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """`language` is what stands behind the opening fence."""

    page: str
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}: {self.text.splitlines()[0][:40]}"


def blocks(language: str | None = None) -> list[Block]:
    """Of all pages in order; `language` None is all."""
    return [
        Block(path.name, each, text)
        for path in PAGES
        for each, text in _BLOCK.findall(path.read_text())
        if language in (None, each)
    ]


def block(page: str, beginning: str) -> Block:
    """The only one of `page` that begins so."""
    [found] = [each for each in blocks() if each.page == page and each.text.startswith(beginning)]
    return found
