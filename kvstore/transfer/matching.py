"""Which message goes into which receive: by tag, each in the order they came. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from kvstore.errors import TransferError
from kvstore.transfer.transport import Memory

MAX_UNEXPECTED = 1 << 16  # messages of one link for which no receive is posted
MAX_UNEXPECTED_BYTES = 64 << 20  # that came with them


class Tagged(Protocol):
    @property
    def tag(self) -> int: ...


M = TypeVar("M", bound=Tagged)


@dataclass(frozen=True, slots=True)
class Receive:
    number: int
    tag: int
    into: Memory


class Matching(Generic[M]):
    """Receives and messages that still wait for each other."""

    def __init__(self) -> None:
        self._receives: dict[int, deque[Receive]] = {}  # by tag; never an empty one
        self._tags: dict[int, int] = {}  # of each receive that waits, by its number
        self._messages: dict[int, deque[M]] = {}
        self._unexpected = 0
        self._unexpected_bytes = 0

    @property
    def num_receives(self) -> int:
        return len(self._tags)

    def post(self, receive: Receive) -> M | None:
        """The message for it, if it is here; else the receive waits."""
        messages = self._messages.get(receive.tag)
        if messages is None:
            self._receives.setdefault(receive.tag, deque()).append(receive)
            self._tags[receive.number] = receive.tag
            return None
        message = messages.popleft()
        if not messages:
            del self._messages[receive.tag]
        self._unexpected -= 1
        self._unexpected_bytes -= _carried(message)
        return message

    def arrive(self, message: M) -> Receive | None:
        """The receive for it, if one is posted; else the message waits. Raises TransferError if too many do."""
        receives = self._receives.get(message.tag)
        if receives is not None:
            receive = receives.popleft()
            if not receives:
                del self._receives[message.tag]
            del self._tags[receive.number]
            return receive
        self._unexpected += 1
        self._unexpected_bytes += _carried(message)
        if self._unexpected > MAX_UNEXPECTED or self._unexpected_bytes > MAX_UNEXPECTED_BYTES:
            raise TransferError("the peer sends what nobody asked for, without end")
        self._messages.setdefault(message.tag, deque()).append(message)
        return None

    def cancel(self, number: int) -> bool:
        """Whether it waited, and now no longer does."""
        tag = self._tags.pop(number, None)
        if tag is None:
            return False
        left = deque(receive for receive in self._receives[tag] if receive.number != number)
        if left:
            self._receives[tag] = left
        else:
            del self._receives[tag]
        return True

    def receives(self) -> Iterator[int]:
        """The numbers of those that wait."""
        return iter(self._tags)


def _carried(message: object) -> int:
    return len(getattr(message, "data", b""))
