"""The JSON body of a request: bounded bytes to an object of bounded depth."""

from __future__ import annotations

from typing import Any

import msgspec

from pdserve.errors import InvalidRequest

MAX_JSON_DEPTH = 32


def decode_body(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`. Strict JSON: no NaN, no infinity, no lone surrogates, UTF-8 only.

    Raises:
        InvalidRequest: anything else.
    """
    try:
        value = msgspec.json.decode(body)
    except UnicodeDecodeError as error:
        raise InvalidRequest("The request body is not valid UTF-8.") from error
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"The request body is not valid JSON: {error}.") from error
    except RecursionError as error:
        raise _too_deep() from error
    if not isinstance(value, dict):
        raise InvalidRequest("The request body must be a JSON object.")
    if deeper_than(value, MAX_JSON_DEPTH):
        raise _too_deep()
    return value


def deeper_than(value: dict[str, Any], levels: int) -> bool:
    """Whether objects and arrays are nested in more than so many levels, `value` itself counted."""
    level: list[Any] = [value]
    for _ in range(levels):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


def _too_deep() -> InvalidRequest:
    return InvalidRequest(f"The request body is nested deeper than {MAX_JSON_DEPTH} levels.")
