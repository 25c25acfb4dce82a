"""Commands from any thread to one progress thread, which sleeps on a descriptor when there is nothing to do."""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from collections.abc import Callable

Command = Callable[[], None]


class Inbox:
    """A queue with an eventfd that is only written while the reader is asleep, so that a batch costs one system call.

    The reader sets `asleep` and looks once more before it waits; a writer appends and then looks at `asleep`. One of
    the two sees the other, in whatever order they run. Its length is bounded by what callers may have open.
    """

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._commands: deque[Command] = deque()
        self._asleep = False
        self._closed = False
        self._lock = threading.Lock()  # keeps `put` from writing to a descriptor that is closed or another's
        self._poll = select.poll()
        self._poll.register(self.fd, select.POLLIN)

    def put(self, command: Command) -> None:
        self._commands.append(command)
        if self._asleep:
            with self._lock:
                if not self._closed:  # the reader may have woken by itself, run the command, and ended
                    os.eventfd_write(self.fd, 1)

    def run_all(self) -> bool:
        """Run what came in so far; returns whether there was anything."""
        worked = False
        for _ in range(len(self._commands)):
            self._commands.popleft()()
            worked = True
        return worked

    def fall_asleep(self) -> bool:
        """From now on a `put` signals `fd`; False, and still awake, if something came in meanwhile."""
        self._asleep = True
        if self._commands:
            self._asleep = False
            return False
        return True

    def wait(self, timeout_s: float) -> None:
        """Wait for a command alone, while asleep."""
        self._poll.poll(timeout_s * 1e3)

    def wake_up(self) -> None:
        self._asleep = False
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return  # it was not this descriptor that ended the sleep

    def close(self) -> None:
        with self._lock:
            self._closed = True
            os.close(self.fd)
