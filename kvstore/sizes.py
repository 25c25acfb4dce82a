"""Sizes as people write them."""

from __future__ import annotations

import re

import typer

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """`4GiB`, `512M`, `1048576`, `0`: bytes, in powers of 1024. Raises typer.BadParameter."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is no size; write 1073741824, 512M or 1.5GiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])
