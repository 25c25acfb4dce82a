"""A link with another process as a program on an asyncio loop uses it: each operation ends in a call on the loop.

On one machine the peer's death is learnt from a pidfd; closing is the proof that nothing lands any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable

from kvstore.errors import LinkClosed, TransferError
from kvstore.transfer.transport import Completion, Memory, Transport

Done = Callable[[Completion], None]

_TOLD_AT_ONCE = 16  # other calls have their turn in between


class LoopLink:
    """Use on the loop only; to make one may block, and may be done in a thread."""

    def __init__(self, peer_id: str, transport: Transport, loop: asyncio.AbstractEventLoop, *, same_host: bool) -> None:
        self.peer_id = peer_id
        self.closing: asyncio.Future[None] | None = None  # set once it is being closed; done when that is proven
        self._loop = loop
        self._pidfd: int | None = None
        self._waiting: dict[int, Done] = {}
        self._ended: deque[Completion] = deque()  # not told yet
        self._awake = False  # the loop will look at `_ended`
        self._lock = threading.Lock()  # of the two above
        self.link = transport.open(self._hand_over, same_host=same_host)

    def send(self, tag: int, data: Memory, done: Done) -> int:
        """Raises TransferError. `done` is called on the loop, exactly once, after this returned."""
        self._check()
        operation = self.link.send(tag, data)
        self._waiting[operation] = done
        return operation

    def receive(self, tag: int, into: Memory, done: Done) -> int:
        """Raises TransferError. `done` is called on the loop, exactly once, after this returned."""
        self._check()
        operation = self.link.receive(tag, into)
        self._waiting[operation] = done
        return operation

    def cancel(self, operation: int) -> None:
        if operation in self._waiting:
            self.link.cancel(operation)

    def watch(self, pid: int, gone: Callable[[], object]) -> None:
        """`gone` is called when the peer's process, of this machine, has ended. Raises TransferError if it has."""
        try:
            self._pidfd = os.pidfd_open(pid)
        except (OSError, OverflowError) as error:
            raise TransferError(f"the process of {self.peer_id} (pid {pid}) is gone") from error
        self._loop.add_reader(self._pidfd, gone)

    def close(self) -> asyncio.Future[None]:
        """Close for good; done once it is proven that nothing lands any more. Open operations complete as FAILED."""
        if self.closing is None:
            if self._pidfd is not None:
                self._loop.remove_reader(self._pidfd)
                os.close(self._pidfd)
            self.closing = self._loop.run_in_executor(None, self.link.close)
        return self.closing

    def _check(self) -> None:
        if self.closing is not None:
            raise LinkClosed(f"the link with {self.peer_id} is closed")

    def _hand_over(self, completion: Completion) -> None:
        """On the transport's thread. The loop is woken for the first of a run only: waking costs more than looking."""
        with self._lock:
            self._ended.append(completion)
            wake, self._awake = not self._awake, True
        if wake:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever waited
                self._loop.call_soon_threadsafe(self._tell)

    def _tell(self) -> None:
        with self._lock:
            run = [self._ended.popleft() for _ in range(min(len(self._ended), _TOLD_AT_ONCE))]
            self._awake = bool(run)
        if run:
            self._loop.call_soon(self._tell)
        for completion in run:
            if (done := self._waiting.pop(completion.operation, None)) is not None:
                done(completion)
