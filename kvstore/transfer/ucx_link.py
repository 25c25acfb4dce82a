"""One UCX link: its worker, its endpoint and its open operations.

    OPEN ── connect ──> CONNECTED ── peer lost ──> LOST
      └───────────────── close ─────────┴── close ──┴──> CLOSED        LOST and CLOSED: the UCX worker is destroyed

A link that lost its peer is taken down at once, its open operations FAILED; what is asked of it afterwards fails too.
Methods under "any thread" only put commands into the inbox; those under "progress thread" do the UCX calls.
"""

from __future__ import annotations

import itertools
import os
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, Protocol

import xxhash

from kvstore.errors import LinkClosed, TransferError
from kvstore.transfer.contract import MAX_OPEN_OPERATIONS, check_operation, deliver
from kvstore.transfer.inbox import Inbox
from kvstore.transfer.transport import Completion, CompletionHandler, Memory, Outcome
from kvstore.transfer.ucp import UcpCalls

_BURST = 8  # progress calls, of up to 128 KiB (shared memory) or 1 MiB (TCP), between two looks at the operations
_GLANCE = 8  # operations end nearly in order: all of them are looked at only before going to sleep

_QUIESCE_DEADLINE_S = 0.1
_UCS_OK, _UCS_TRUNCATED, _UCS_CANCELED = 0, -9, -16
_ADDRESS = struct.Struct("<4sHQ")  # magic, bytes of the UCX address, their xxh3-64
_ADDRESS_MAGIC = b"PDU1"


class LinkState(Enum):
    OPEN = "open"
    CONNECTED = "connected"
    LOST = "lost"
    CLOSED = "closed"


class LinkHost(Protocol):
    """What a link needs of its transport."""

    inbox: Inbox
    library: Any  # ucxx._lib.libucxx
    array: Any  # ucxx._lib.arr.Array
    ucp: UcpCalls

    def call(self, command: Callable[[], None]) -> None:
        """Run it on the progress thread and wait for it."""
        ...

    def retire(self, link: UcxLink) -> None:
        """Forget the link's descriptor; on the progress thread."""
        ...


@dataclass(slots=True)
class _Operation:
    """Holds the buffer too: UCX keeps a bare pointer to it."""

    request: Any
    buffer: Memory
    is_receive: bool
    cancel_asked: bool = False


def wrap_address(ucx_address: bytes) -> bytes:
    """UCX parses an address without checking it, so it travels with its length and checksum."""
    return _ADDRESS.pack(_ADDRESS_MAGIC, len(ucx_address), xxhash.xxh3_64_intdigest(ucx_address)) + ucx_address


def unwrap_address(address: bytes) -> bytes:
    """Raises TransferError if it is not what `wrap_address` made."""
    body = address[_ADDRESS.size :]
    if address[: _ADDRESS.size] != _ADDRESS.pack(_ADDRESS_MAGIC, len(body) & 0xFFFF, xxhash.xxh3_64_intdigest(body)):
        raise TransferError("peer address is not a UCX address of this version, or is damaged")
    return body


class UcxLink:
    def __init__(self, host: LinkHost, handler: CompletionHandler, worker: Any) -> None:
        self._host = host
        self._handler = handler
        self._worker = worker
        self._endpoint: Any = None
        self._state = LinkState.OPEN
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()  # orders `close` after every operation accepted before it
        self._closing = False
        self._num_open = 0
        self._operations: dict[int, _Operation] = {}
        self._look = False  # an operation may have ended outside `progress`
        self._unseen = False  # something moved since all operations were looked at
        self._transports = ""
        self.address = wrap_address(worker.address.tobytes())
        self.event_fd: int = worker.epoll_file_descriptor

    # --- any thread ---

    def connect(self, peer_address: bytes) -> None:
        body = unwrap_address(peer_address)
        with self._lock:
            if self._closing:
                raise LinkClosed("the link is closed")
        self._host.call(partial(self._connect, body))

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
        self._host.inbox.put(partial(self._cancel, operation))

    def describe(self) -> str:
        """The endpoint's lanes as UCX reports them, with the state when it is no longer connected."""
        if self._state in (LinkState.OPEN, LinkState.CONNECTED):
            return self._transports
        return f"{self._transports} ({self._state.value})"

    def close(self) -> None:
        with self._lock:
            self._closing = True
        try:
            self._host.call(partial(self.take_down, LinkState.CLOSED, "the link was closed"))
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
            self._host.inbox.put(partial(post, number, tag, buffer))
        return number

    # --- progress thread ---

    def advance(self) -> bool:
        """Let UCX work and deliver what ended; returns whether anything moved."""
        worker = self._worker
        if worker is None:
            return False
        worked, self._look = self._look, False
        for _ in range(_BURST):
            if not worker.progress_once():
                break
            worked = True
        if worked:
            self._collect(_GLANCE)
            self._unseen = True
        if self._endpoint is not None and not self._endpoint.alive:
            self.take_down(LinkState.LOST, "the peer is gone")
        return worked

    def arm(self) -> bool:
        """Look at all operations, then have the next event signal `event_fd`; False if there is more to do first."""
        if self._worker is None:
            return True
        if self._unseen:
            self._unseen = False
            if self._collect(len(self._operations)):
                return False
        return bool(self._worker.arm())

    def take_down(self, state: LinkState, reason: str) -> None:
        """End all operations, destroy the UCX worker so that nothing lands any more, and only then deliver."""
        with self._lock:
            if state is LinkState.CLOSED:
                self._closing = True
            if self._state is not LinkState.CLOSED:
                self._state = state
        if self._worker is None:
            return
        self._host.retire(self)
        if not self._quiesce():
            self._host.ucp.destroy(self._worker)
            os.close(self.event_fd)  # it would have been closed by the destructor that never runs
        ended = [self._completion(number, operation, reason) for number, operation in self._operations.items()]
        # Operations and endpoint hold the worker: with the last of them it is destroyed, here and now.
        self._operations.clear()
        self._endpoint = None
        self._worker = None
        self._deliver(ended)

    def _quiesce(self) -> bool:
        """Have UCX end every operation; a forced close does not wait for the peer, so it takes about a millisecond.

        Returns False if sends hang: that of shared memory does, once a dead or frozen peer's segment is full.
        """
        for operation in self._operations.values():
            if operation.is_receive:
                self._host.ucp.cancel(operation.request.ucxx_ptr)
        if self._endpoint is not None:
            self._endpoint.close_blocking()
        deadline_s = time.monotonic() + _QUIESCE_DEADLINE_S
        while time.monotonic() < deadline_s:
            self._worker.progress()
            sends = self._endpoint is not None and self._host.ucp.count_ending(self._endpoint.ucxx_ptr)
            if not sends and all(operation.request.completed for operation in self._operations.values()):
                return True
        return False

    def _connect(self, ucx_address: bytes) -> None:
        if self._state is not LinkState.OPEN:
            raise LinkClosed("the link is closed") if self._closing else TransferError("the link is connected already")
        library = self._host.library
        try:
            self._endpoint = library.UCXEndpoint.create_from_worker_address(
                self._worker, library.UCXAddress.create_from_buffer(ucx_address), endpoint_error_handling=True
            )
        except library.UCXError as error:
            raise TransferError(f"UCX cannot reach the peer: {error}") from error
        self._transports = ", ".join(sorted(set(self._host.ucp.transports(self._endpoint.handle))))
        self._state = LinkState.CONNECTED

    def _post_send(self, number: int, tag: int, data: Memory) -> None:
        if self._state is not LinkState.CONNECTED:
            self._refuse(number, f"the link is {self._state.value}")
            return
        library = self._host.library
        try:
            request = self._endpoint.tag_send(self._host.array(data), library.UCXXTag(tag))
        except library.UCXError as error:
            self._refuse(number, str(error))
            return
        self._operations[number] = _Operation(request, data, is_receive=False)
        self._look = True

    def _post_receive(self, number: int, tag: int, into: Memory) -> None:
        if self._worker is None:
            self._refuse(number, f"the link is {self._state.value}")
            return
        library = self._host.library
        try:
            request = self._worker.tag_recv(self._host.array(into), library.UCXXTag(tag), library.UCXXTagMaskFull)
        except library.UCXError as error:
            self._refuse(number, str(error))
            return
        self._operations[number] = _Operation(request, into, is_receive=True)
        self._look = True

    def _refuse(self, number: int, reason: str) -> None:
        self._deliver([Completion(number, Outcome.FAILED, 0, reason)])

    def _cancel(self, number: int) -> None:
        operation = self._operations.get(number)
        if operation is not None and operation.is_receive:
            operation.cancel_asked = True
            self._host.ucp.cancel(operation.request.ucxx_ptr)
            self._look = True

    def _collect(self, max_open: int) -> bool:
        """Deliver what has ended, oldest first, looking past `max_open` operations that have not; whether any had."""
        ended: list[int] = []
        for number, operation in self._operations.items():
            if operation.request.completed:
                ended.append(number)
            elif max_open == 0:
                break
            else:
                max_open -= 1
        self._deliver([self._completion(number, self._operations.pop(number)) for number in ended])
        return bool(ended)

    def _completion(self, number: int, operation: _Operation, reason: str = "") -> Completion:
        request = operation.request
        status = int(request.status) if request.completed else _UCS_CANCELED
        if status == _UCS_OK:
            return Completion(number, Outcome.DONE, operation.buffer.nbytes)
        if status == _UCS_TRUNCATED:
            return Completion(number, Outcome.TRUNCATED, 0, "the message is larger than the buffer")
        if status == _UCS_CANCELED and operation.cancel_asked:
            return Completion(number, Outcome.CANCELLED, 0)
        return Completion(number, Outcome.FAILED, 0, reason or f"UCX status {status}")

    def _deliver(self, completions: list[Completion]) -> None:
        with self._lock:
            self._num_open -= len(completions)
        for completion in completions:
            deliver(self._handler, completion)
