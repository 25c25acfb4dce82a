"""The thread that all links of a transport live on: commands come in through its inbox, some callers wait for them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout

from kvstore.errors import LinkClosed, TransferError
from kvstore.transfer.inbox import Inbox

_CALL_DEADLINE_S = 30.0  # for connect and close to get through


class ProgressThread:
    """`run` is the thread's program: it ends once `closing` is set and its links are gone, and closes the inbox."""

    def __init__(self, name: str, run: Callable[[], None]) -> None:
        self.inbox = Inbox()
        self.closing = False
        self._name = name
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def call(self, command: Callable[[], None]) -> None:
        """Run it on the thread and wait. Raises what it raises, LinkClosed once the transport has ended."""
        if threading.current_thread() is self._thread:
            command()
            return
        result: Future[None] = Future()
        with self._lock:
            closing = self.closing
            if not closing:
                self.inbox.put(lambda: _settle(result, command))
        if closing:
            self._join()
            raise LinkClosed("the transport is closed")
        try:
            result.result(_CALL_DEADLINE_S)
        except FutureTimeout as error:
            raise TransferError(f"the thread {self._name} did not answer within {_CALL_DEADLINE_S} s") from error

    def close(self, close_links: Callable[[], None]) -> None:
        """Have the thread close its links and end; returns when it has. Idempotent."""
        with self._lock:
            if not self.closing:
                self.closing = True
                self.inbox.put(close_links)
        if threading.current_thread() is not self._thread:
            self._join()

    def _join(self) -> None:
        self._thread.join(_CALL_DEADLINE_S)
        if self._thread.is_alive():
            raise TransferError(f"the thread {self._name} did not end within {_CALL_DEADLINE_S} s")


def do_nothing() -> None:
    """There is no GPU whose copies would have to be waited for."""


def _settle(result: Future[None], command: Callable[[], None]) -> None:
    """Run it; whatever it raises is the waiting caller's."""
    try:
        command()
        result.set_result(None)
    except Exception as error:
        result.set_exception(error)
