"""What the two ends of a NIXL link tell each other in notifications: a run of records, each of a fixed head.

    OFFER   kind u8 | operation u64 | tag u64 | address u64 | size u64 | device u32 | is_device u8    come and read this
    INLINE  kind u8 | operation u64 | tag u64 | size u64, then that many bytes                       this is all of it
    TAKEN   kind u8 | operation u64 | whole u8                 of the other's offer: read, or larger than the buffer
    ALIVE   kind u8

All little-endian. A peer is trusted, yet what it says is checked: nothing here is longer than the notification.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from kvstore.errors import TransferError

_OFFER, _INLINE, _TAKEN, _ALIVE = 1, 2, 3, 4
_OFFER_BODY = struct.Struct("<QQQQIB")
_INLINE_BODY = struct.Struct("<QQQ")
_TAKEN_BODY = struct.Struct("<QB")


@dataclass(frozen=True, slots=True)
class Offer:
    """A message that lies in registered memory of its sender."""

    operation: int  # the sender's
    tag: int
    address: int
    size: int
    device: int  # its number
    is_device: bool

    def encode(self) -> bytes:
        fields = (self.operation, self.tag, self.address, self.size, self.device, self.is_device)
        return bytes((_OFFER,)) + _OFFER_BODY.pack(*fields)


@dataclass(frozen=True, slots=True)
class Inline:
    """A message that came with its head."""

    operation: int
    tag: int
    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def encode(self) -> bytes:
        return bytes((_INLINE,)) + _INLINE_BODY.pack(self.operation, self.tag, len(self.data)) + self.data


@dataclass(frozen=True, slots=True)
class Taken:
    operation: int  # of whom it is told to
    whole: bool

    def encode(self) -> bytes:
        return bytes((_TAKEN,)) + _TAKEN_BODY.pack(self.operation, self.whole)


@dataclass(frozen=True, slots=True)
class Alive:
    """Says nothing: that it cannot be sent is what its sender wants to know."""

    def encode(self) -> bytes:
        return bytes((_ALIVE,))


Message = Offer | Inline
Record = Offer | Inline | Taken | Alive


def decode(notification: bytes) -> Iterator[Record]:
    """Raises TransferError where it is not a run of records."""
    at = 0
    try:
        while at < len(notification):
            kind, at = notification[at], at + 1
            match kind:
                case 1:
                    operation, tag, address, size, device, is_device = _OFFER_BODY.unpack_from(notification, at)
                    at += _OFFER_BODY.size
                    yield Offer(operation, tag, address, size, device, bool(is_device))
                case 2:
                    operation, tag, size = _INLINE_BODY.unpack_from(notification, at)
                    at += _INLINE_BODY.size
                    data, at = notification[at : at + size], at + size
                    if len(data) != size:
                        raise TransferError("a message is shorter than its head says")
                    yield Inline(operation, tag, data)
                case 3:
                    operation, whole = _TAKEN_BODY.unpack_from(notification, at)
                    at += _TAKEN_BODY.size
                    yield Taken(operation, bool(whole))
                case 4:
                    yield Alive()
                case _:
                    raise TransferError(f"a record of kind {kind} is not one of this version")
    except struct.error as error:
        raise TransferError(f"a record is cut short: {error}") from error
