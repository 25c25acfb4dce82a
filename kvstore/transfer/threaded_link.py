"""What the links of transports with a progress thread have in common: the half that any thread may call.

    OPEN ── connect ──> CONNECTED ── peer lost ──> LOST
      └───────────────── close ─────────┴── close ──┴──> CLOSED        LOST and CLOSED: nothing lands any more

Public methods only put commands into the inbox; the others run on the progress thread.
"""

from __future__ import annotations

import itertools
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import Enum
from functools import partial

import xxhash

from kvstore.errors import LinkClosed, TransferError
from kvstore.transfer.contract import MAX_OPEN_OPERATIONS, check_operation, deliver
from kvstore.transfer.progress import ProgressThread
from kvstore.transfer.transport import Completion, CompletionHandler, Memory, Outcome

_ADDRESS = struct.Struct("<4sHQ")  # magic, bytes of the library's address, their xxh3-64


class LinkState(Enum):
    OPEN = "open"
    CONNECTED = "connected"
    LOST = "lost"
    CLOSED = "closed"


class ThreadedLink(ABC):
    """`address` is to be set by whoever inherits."""

    magic: bytes  # 4 bytes: whose addresses these are
    address: bytes

    def __init__(self, progress: ProgressThread, handler: CompletionHandler) -> None:
        self._progress = progress
        self._handler = handler
        self._state = LinkState.OPEN
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()  # orders `close` after every operation accepted before it
        self._closing = False
        self._num_open = 0

    # --- any thread ---

    def connect(self, peer_address: bytes) -> None:
        body = unwrap_address(self.magic, peer_address)
        with self._lock:
            if self._closing:
                raise LinkClosed("the link is closed")
        self._progress.call(partial(self._connect_once, body))

    def send(self, tag: int, data: Memory) -> int:
        check_operation(tag, data, writable=False)
        if self._state is LinkState.OPEN and not self._closing:
            raise TransferError("send before connect")
        return self._accept(self._post_send, tag, data)

    def receive(self, tag: int, into: Memory) -> int:
        check_operation(tag, into, writable=True)
        return self._accept(self._post_receive, tag, into)

    def cancel(self, operation: int) -> None:
        """A send that was posted is not recalled: it ends as it would have."""
        if self._closing:
            return
        self._progress.inbox.put(partial(self._cancel, operation))

    def close(self) -> None:
        with self._lock:
            self._closing = True
        try:
            self._progress.call(partial(self.take_down, LinkState.CLOSED, "the link was closed"))
        except LinkClosed:
            return  # the transport has ended, and this link with it

    def _accept(self, post: Callable[[int, int, Memory], None], tag: int, buffer: Memory) -> int:
        with self._lock:
            if self._closing:
                raise LinkClosed("the link is closed")
            if self._num_open >= MAX_OPEN_OPERATIONS:
                raise TransferError(f"more than {MAX_OPEN_OPERATIONS} operations are open on one link")
            self._num_open += 1
            number = next(self._numbers)
            self._progress.inbox.put(partial(post, number, tag, buffer))
        return number

    # --- progress thread ---

    @abstractmethod
    def advance(self) -> bool:
        """Let the library work and deliver what ended; returns whether anything moved."""

    @abstractmethod
    def _connect(self, library_address: bytes) -> None:
        """Raises TransferError."""

    @abstractmethod
    def _post_send(self, number: int, tag: int, data: Memory) -> None: ...

    @abstractmethod
    def _post_receive(self, number: int, tag: int, into: Memory) -> None: ...

    @abstractmethod
    def _cancel(self, number: int) -> None: ...

    @abstractmethod
    def _end(self, reason: str) -> list[Completion]:
        """End all operations so that nothing lands any more; what became of them. Called once."""

    def take_down(self, state: LinkState, reason: str) -> None:
        """Deliver only once nothing lands any more. Idempotent."""
        with self._lock:
            if state is LinkState.CLOSED:
                self._closing = True
            ended_before = self._state in (LinkState.LOST, LinkState.CLOSED)
            if self._state is not LinkState.CLOSED:
                self._state = state
        if not ended_before:
            self._deliver(self._end(reason))

    def _connect_once(self, library_address: bytes) -> None:
        if self._state is not LinkState.OPEN:
            raise LinkClosed("the link is closed") if self._closing else TransferError("the link is connected already")
        self._connect(library_address)
        self._state = LinkState.CONNECTED

    def _refuse(self, number: int, reason: str) -> None:
        self._deliver([Completion(number, Outcome.FAILED, 0, reason)])

    def _deliver(self, completions: list[Completion]) -> None:
        with self._lock:
            self._num_open -= len(completions)
        for completion in completions:
            deliver(self._handler, completion)


def wrap_address(magic: bytes, library_address: bytes) -> bytes:
    """Libraries parse an address without checking it, so it travels with its length and checksum."""
    checksum = xxhash.xxh3_64_intdigest(library_address)
    return _ADDRESS.pack(magic, len(library_address) & 0xFFFF, checksum) + library_address


def unwrap_address(magic: bytes, address: bytes) -> bytes:
    """Raises TransferError if it is not what `wrap_address` made."""
    body = address[_ADDRESS.size :]
    if address != wrap_address(magic, body):
        raise TransferError("peer address is not one of this transport and version, or is damaged")
    return body
