"""Runs of block keys as messages carry them, and the check of those that a peer sent."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from kvstore.keys import KEY_BYTES, BlockKey

MAX_KEYS = 1 << 16  # of one call: a million tokens in blocks of 16
_KEY = struct.Struct(f"{KEY_BYTES}s")
NO_PARENT = bytes(KEY_BYTES)


def join_keys(keys: Sequence[BlockKey]) -> bytes:
    """Raises ValueError for more than `MAX_KEYS`."""
    if len(keys) > MAX_KEYS:
        raise ValueError(f"at most {MAX_KEYS} block keys a call, got {len(keys)}")
    return b"".join(keys)


def join_parents(parents: Sequence[BlockKey | None]) -> bytes:
    return b"".join(NO_PARENT if parent is None else parent for parent in parents)


def split_keys(data: bytes) -> list[BlockKey]:
    """Raises ValueError if it is no run of keys, or longer than `MAX_KEYS`."""
    if len(data) % KEY_BYTES or len(data) > MAX_KEYS * KEY_BYTES:
        raise ValueError(f"{len(data)} bytes are no run of at most {MAX_KEYS} block keys")
    return split_all(data)


def split_all(data: bytes) -> list[BlockKey]:
    """Of our own bytes, which are a run of keys however many."""
    return [key for (key,) in _KEY.iter_unpack(data)]


def split_parents(data: bytes) -> list[BlockKey | None]:
    """Raises ValueError like `split_keys`."""
    return [None if key == NO_PARENT else key for key in split_keys(data)]
