"""The UCX transport: tagged messages through ucxx, one progress thread a transport, one UCX worker a link.

Who writes the receiver's memory: only the receiver's own copy of UCX. `RNDV_SCHEME=am` makes the sender put fragments
into a shared segment or a socket, from which the receiver's library copies them into the posted buffer. So a sender
that was frozen and wakes up after our link closed fills a segment that nobody reads. With `put_zcopy` the sender would
write. A scheme is a preference ("last resort" in UCX's source), so protocols of writing are taken off the list by name.
With `get_zcopy` the receiver reads, which is as safe, but a sender that dies amid that corrupts the receiver's heap
(UCX 1.21 over process_vm_readv, in most runs of tests/kvstore/transfer/test_process_death.py). The safe scheme is also
the fast one: 256 blocks of 360 KiB, in one run on 2 cores, am 6.9 GB/s, get_zcopy (auto picks it) 5.0, memcpy 6.9.

Error handling stays on within a machine too: `POSIX_ERROR_HANDLING=y` keeps the shared-memory transport, which
otherwise drops out without a word as soon as an endpoint asks for error handling.

UCX notices a dead process (socket reset, or the 2 s keepalive). It does not notice over shared memory that a living
peer closed its end, nor a frozen peer anywhere: those are learnt on the control plane, which then closes the link.

UCX reports no length of a received message: `num_bytes` of a receive is its buffer's size, and a message that was too
short shows in the checksum.
"""

from __future__ import annotations

import importlib
import os
import select
import time
from collections.abc import Callable

from kvstore.errors import TransferError, Unavailable
from kvstore.transfer.progress import ProgressThread, do_nothing
from kvstore.transfer.threaded_link import LinkState
from kvstore.transfer.transport import CompletionHandler
from kvstore.transfer.ucp import UcpCalls
from kvstore.transfer.ucx_link import UcxLink

_COMMON = {
    "RNDV_SCHEME": "am",
    "PROTOS": "^rndv/put/*",
    "KEEPALIVE_INTERVAL": "2s",
    "TCP_TX_SEG_SIZE": "1m",  # the default of 8k costs three quarters of the speed
    "TCP_RX_SEG_SIZE": "1m",
}
# TCP stays as the way out for two containers of one machine that share no /dev/shm.
_SAME_HOST = _COMMON | {
    "TLS": "posix,tcp",
    "POSIX_ERROR_HANDLING": "y",
    "POSIX_SEG_SIZE": "32k",  # fewer fragments than by the default of 8k; 64k truncates messages (UCX 1.21)
}
# Device memory goes the same way: the receiver's UCX copies fragments into it. Without cuda_copy UCX would read a
# device's address as the host's. The direct way, cuda_ipc, is that of `kvstore.transfer.nixl`.
_DEVICE_TLS = ",cuda_copy"

_MAX_SLEEP_S = 1.0
_STALL_S = 0.001
_EAGER_ROUNDS = 200  # about a millisecond, in which a live receiver makes room


class UcxTransport:
    """Raises Unavailable where ucxx is not installed or not a version that we know."""

    name = "ucx"

    def __init__(self, settle: Callable[[], None] | None = None) -> None:
        """
        Args:
            settle: where buffers lie in the memory of a GPU: waits for all that this process has queued there,
                copies of UCX included.
        """
        # UCX would otherwise warn of variables that other packages set for themselves.
        os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")
        try:
            self.library = importlib.import_module("ucxx._lib.libucxx")
            self.array = importlib.import_module("ucxx._lib.arr").Array
        except ImportError as error:
            raise Unavailable(f"UCX needs the package ucxx-cu12 (or ucxx-cu13) 0.52: {error}") from error
        try:
            self.ucp = UcpCalls.load()
        except (OSError, AttributeError) as error:
            raise Unavailable(f"this ucxx is not version 0.52, the one that is known to work: {error}") from error
        self._device = settle is not None
        self.settle = settle or do_nothing
        self.progress = ProgressThread("ucx-progress", self._run)
        self.inbox = self.progress.inbox
        self._epoll = select.epoll()
        self._epoll.register(self.inbox.fd, select.EPOLLIN)
        self._links: list[UcxLink] = []  # with a live UCX worker; of the progress thread
        self.progress.start()

    def open(self, handler: CompletionHandler, *, same_host: bool) -> UcxLink:
        """Raises LinkClosed after `close`, TransferError if UCX refuses."""
        library = self.library
        features = (library.Feature.TAG, library.Feature.WAKEUP)
        try:
            context = library.UCXContext(self._settings(same_host), feature_flags=features)
            worker = library.UCXWorker(context, enable_delayed_submission=False, enable_python_future=False)
            worker.init_blocking_progress_mode()
        except library.UCXError as error:
            raise TransferError(f"UCX cannot open a link: {error}") from error
        link = UcxLink(self, handler, worker)
        self.progress.call(lambda: self._adopt(link))
        return link

    def _settings(self, same_host: bool) -> dict[str, str]:
        settings = _SAME_HOST if same_host else _COMMON
        if not self._device:
            return settings
        return settings | {"TLS": settings.get("TLS", "tcp") + _DEVICE_TLS}

    def close(self) -> None:
        self.progress.close(self._close_links)

    def retire(self, link: UcxLink) -> None:
        """Stop watching a link whose UCX worker is about to be destroyed; on the progress thread."""
        if link in self._links:
            self._links.remove(link)
            self._epoll.unregister(link.event_fd)

    def _adopt(self, link: UcxLink) -> None:
        self._links.append(link)
        self._epoll.register(link.event_fd, select.EPOLLIN)

    def _close_links(self) -> None:
        for link in tuple(self._links):
            link.take_down(LinkState.CLOSED, "the transport was closed")

    def _run(self) -> None:
        idle_rounds = 0
        try:
            self.settle()  # makes the GPU's context this thread's own: UCX copies in whichever is current
            while self._links or not self.progress.closing:
                worked = self.inbox.run_all()
                for link in tuple(self._links):
                    worked |= link.advance()
                begin_s = time.monotonic()
                if not worked:
                    self._sleep(idle_rounds)
                rested = idle_rounds <= _EAGER_ROUNDS and time.monotonic() - begin_s > _STALL_S
                idle_rounds = 0 if worked or rested else idle_rounds + 1
        finally:
            self.progress.closing = True
            self._close_links()
            self.inbox.run_all()  # what was accepted while the links closed is refused
            self._epoll.close()
            self.inbox.close()

    def _sleep(self, idle_rounds: int) -> None:
        """Wait for a command or for UCX.

        UCX has no event for room in a full segment, and a half-made TCP connection may signal without end. So after
        many rounds in a row that moved nothing, only commands wake the thread, and it looks at UCX once in `_STALL_S`.
        """
        if not self.inbox.fall_asleep():
            return
        armed = [link.arm() for link in self._links]  # each one: arming also looks for what has ended
        if idle_rounds > _EAGER_ROUNDS:
            self.inbox.wait(_STALL_S)
        elif all(armed):
            self._epoll.poll(_MAX_SLEEP_S)
        else:
            os.sched_yield()  # the receiver may need this very core; spinning here costs three quarters of the speed
        self.inbox.wake_up()
