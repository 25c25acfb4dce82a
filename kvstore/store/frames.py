"""Frames between a worker and its store node: what a byte stream is cut into. Pure.

    payload_bytes u32 | kind u8 | zeros 3 | call u32 | payload

In the byte order of the machine, which both ends share. `call` is the caller's number of a call, which the reply
repeats. Nothing after a bad frame can be trusted, so the connection it came from is closed.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

from kvstore.errors import KvError

MAX_PAYLOAD_BYTES = 4 << 20  # two runs of `wire.MAX_KEYS` keys take half of it
_HEAD = struct.Struct("=IB3sI")
HEAD_BYTES = _HEAD.size
_ZEROS = bytes(3)


class BadFrame(KvError):
    """The other end does not speak this protocol; the message says what is wrong."""


class Kind(IntEnum):
    """Of a frame. A reply has the number of its call; a call with 0 wants none. A refusal is the last frame."""

    HELLO = 1
    LOOKUP = 2
    LOAD = 3
    RELEASE = 4  # has no reply
    BEGIN_SAVE = 5
    COMMIT_SAVE = 6
    ABANDON_SAVE = 7
    REPORT_CORRUPT = 8
    HOLD = 9  # has no reply
    REPLY = 64
    REFUSAL = 65


class Frame(NamedTuple):
    kind: int  # a `Kind`, or what nobody knows
    call: int
    payload: bytes


def encode_frame(kind: Kind, call: int, payload: bytes) -> bytes:
    """Raises ValueError if the payload is longer than `MAX_PAYLOAD_BYTES`."""
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise ValueError(f"a frame carries at most {MAX_PAYLOAD_BYTES} bytes, got {len(payload)}")
    return _HEAD.pack(len(payload), kind, _ZEROS, call) + payload


class FrameReader:
    """Cuts a stream into frames, however its bytes arrive. Holds one unfinished frame at most."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that are complete now. Raises BadFrame; the reader is of no use afterwards."""
        if self._rest:
            self._rest += data
            data = bytes(self._rest) if len(self._rest) >= self._wanted() else b""
            if not data:
                return []
            self._rest.clear()
        frames: list[Frame] = []
        start, end = 0, len(data)
        while end - start >= HEAD_BYTES:
            num_bytes, kind, call = _head(data, start)
            after = start + HEAD_BYTES + num_bytes
            if after > end:
                break
            frames.append(Frame(kind, call, data[start + HEAD_BYTES : after]))
            start = after
        if start < end:
            self._rest += memoryview(data)[start:]
        return frames

    def _wanted(self) -> int:
        """Bytes of the unfinished frame, as far as is known: to join a large one at each read would be quadratic."""
        return HEAD_BYTES if len(self._rest) < HEAD_BYTES else HEAD_BYTES + _head(self._rest, 0)[0]


def _head(data: bytes | bytearray, start: int) -> tuple[int, int, int]:
    """Bytes of the payload, kind and call. Raises BadFrame."""
    num_bytes, kind, zeros, call = _HEAD.unpack_from(data, start)
    if num_bytes > MAX_PAYLOAD_BYTES or zeros != _ZEROS:
        raise BadFrame("what came is no frame of this protocol")
    return num_bytes, kind, call
