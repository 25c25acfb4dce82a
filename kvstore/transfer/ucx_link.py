"""One UCX link: its worker, its endpoint and its open operations.

A link that lost its peer is taken down at once, its open operations FAILED; what is asked of it afterwards fails too.
LOST and CLOSED mean that the UCX worker is destroyed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from kvstore.errors import TransferError
from kvstore.transfer.progress import ProgressThread
from kvstore.transfer.threaded_link import LinkState, ThreadedLink, wrap_address
from kvstore.transfer.transport import Completion, CompletionHandler, Memory, Outcome
from kvstore.transfer.ucp import UcpCalls

_BURST = 8  # progress calls, of up to 128 KiB (shared memory) or 1 MiB (TCP), between two looks at the operations
_GLANCE = 8  # operations end nearly in order: all of them are looked at only before going to sleep

_QUIESCE_DEADLINE_S = 0.1
_UCS_OK, _UCS_TRUNCATED, _UCS_CANCELED = 0, -9, -16


class LinkHost(Protocol):
    """What a link needs of its transport."""

    progress: ProgressThread
    library: Any  # ucxx._lib.libucxx
    array: Any  # ucxx._lib.arr.Array
    ucp: UcpCalls
    settle: Callable[[], None]  # waits for copies that this process has queued on its GPU

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


class UcxLink(ThreadedLink):
    magic = b"PDU1"

    def __init__(self, host: LinkHost, handler: CompletionHandler, worker: Any) -> None:
        super().__init__(host.progress, handler)
        self._host = host
        self._worker = worker
        self._endpoint: Any = None
        self._operations: dict[int, _Operation] = {}
        self._look = False  # an operation may have ended outside `progress`
        self._unseen = False  # something moved since all operations were looked at
        self._transports = ""
        self.address = wrap_address(self.magic, worker.address.tobytes())
        self.event_fd: int = worker.epoll_file_descriptor

    def describe(self) -> str:
        """The endpoint's lanes as UCX reports them, with the state when it is no longer connected."""
        if self._state in (LinkState.OPEN, LinkState.CONNECTED):
            return self._transports
        return f"{self._transports} ({self._state.value})"

    # --- progress thread ---

    def advance(self) -> bool:
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

    def _end(self, reason: str) -> list[Completion]:
        """Destroys the UCX worker."""
        self._host.retire(self)
        if not self._quiesce():
            self._host.ucp.destroy(self._worker)
            os.close(self.event_fd)  # it would have been closed by the destructor that never runs
        ended = [self._completion(number, operation, reason) for number, operation in self._operations.items()]
        # Operations and endpoint hold the worker: with the last of them it is destroyed, here and now.
        self._operations.clear()
        self._endpoint = None
        self._worker = None
        self._host.settle()
        return ended

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
        library = self._host.library
        try:
            self._endpoint = library.UCXEndpoint.create_from_worker_address(
                self._worker, library.UCXAddress.create_from_buffer(ucx_address), endpoint_error_handling=True
            )
        except library.UCXError as error:
            raise TransferError(f"UCX cannot reach the peer: {error}") from error
        self._transports = ", ".join(sorted(set(self._host.ucp.transports(self._endpoint.handle))))

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
