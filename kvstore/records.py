"""Records in Redis are somebody else's text: JSON objects of a bounded length."""

from __future__ import annotations

import json
from typing import Any


def read_record(text: str | bytes, max_bytes: int, what: str) -> dict[str, Any]:
    """Raises ValueError, which names `what`, for anything but an object of at most `max_bytes`."""
    if len(text) > max_bytes:
        raise ValueError(f"{what} is too long")
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"{what} is nested") from None
    if not isinstance(value, dict):
        raise ValueError(f"{what} is a JSON object")
    return value
