"""Sizes as people write them: powers of 1024, and a sentence for whatever is none."""

from __future__ import annotations

import pytest
import typer

from kvstore.sizes import parse_bytes


@pytest.mark.parametrize(
    ("text", "size"), [("1024", 1024), ("512M", 512 << 20), ("1.5g", 3 << 29), ("2 GiB", 2 << 30), ("8KB", 8192)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "many", "-1", "1X", "1e9"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse_bytes(text)
