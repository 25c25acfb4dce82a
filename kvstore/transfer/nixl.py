"""The NIXL transport: the receiver reads. One progress thread a transport, one agent (with its UCX worker) a link.

NIXL's usual direction is WRITE: the sender's agent writes the receiver's memory. A sender that was frozen and wakes up
after our link closed would then write into blocks that are somebody else's by then, and no completion of our own would
tell. With READ the bytes move by our own agent's doing: destroying that proves that nothing lands any more. The price
is one message each way, an offer and a thank-you; both go in batches.

It joins processes of one machine: the NIXL and UCX of today (1.5.1, 1.21) end a process whose peer dies amid a transfer
over TCP, which was tried with either of their ways to handle errors.

Blocks are read in one piece from memory that both ends have registered beforehand, say the KV pool. Other messages (the
manifest) travel inside a notification.

NIXL has no descriptor to sleep on: the thread looks every millisecond while something is open, less often otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial

from kvstore.errors import TransferError
from kvstore.transfer.nixl_agent import Place, load
from kvstore.transfer.nixl_link import NixlLink
from kvstore.transfer.progress import ProgressThread, do_nothing
from kvstore.transfer.threaded_link import LinkState
from kvstore.transfer.transport import CompletionHandler, Memory

_EAGER_ROUNDS = 200
_BUSY_S, _IDLE_S = 0.001, 0.01  # between two looks


class NixlTransport:
    """Raises Unavailable where NIXL is not installed."""

    name = "nixl"

    def __init__(self, memory: Sequence[Memory] = (), settle: Callable[[], None] | None = None) -> None:
        """
        Args:
            memory: what blocks are parts of; stays as long as the transport.
            settle: where that is of a GPU: waits for all that this process has queued there, copies of UCX included.
        """
        self.library = load()
        self.settle = settle or do_nothing
        self.places: Sequence[Place] = tuple(map(Place.of, memory))
        self._memory = tuple(memory)
        self._links: list[NixlLink] = []  # of the progress thread
        self.progress = ProgressThread("nixl-progress", self._run)
        self.progress.start()

    def open(self, handler: CompletionHandler, *, same_host: bool) -> NixlLink:
        """Raises LinkClosed after `close`, TransferError if NIXL refuses or the peer is of another machine."""
        if not same_host:
            raise TransferError("NIXL joins workers of one machine; between machines start them with --transport ucx")
        opened: list[NixlLink] = []
        self.progress.call(partial(self._open, handler, opened))
        return opened[0]

    def close(self) -> None:
        self.progress.close(self._close_links)

    def retire(self, link: NixlLink) -> None:
        if link in self._links:
            self._links.remove(link)

    def _open(self, handler: CompletionHandler, into: list[NixlLink]) -> None:
        link = NixlLink(self, handler)
        self._links.append(link)
        into.append(link)

    def _close_links(self) -> None:
        for link in tuple(self._links):
            link.take_down(LinkState.CLOSED, "the transport was closed")

    def _run(self) -> None:
        inbox, quiet_rounds = self.progress.inbox, 0
        try:
            self.settle()  # makes the GPU's context this thread's own: CUDA's calls go to whichever is current
            while self._links or not self.progress.closing:
                worked = inbox.run_all()
                for link in tuple(self._links):
                    worked |= link.advance()
                quiet_rounds = 0 if worked else quiet_rounds + 1
                if not worked and inbox.fall_asleep():
                    self._sleep(quiet_rounds)
                    inbox.wake_up()
        finally:
            self.progress.closing = True
            self._close_links()
            inbox.run_all()  # what was accepted while the links closed is refused
            inbox.close()

    def _sleep(self, quiet_rounds: int) -> None:
        busy = any(link.busy for link in self._links)
        if busy and quiet_rounds < _EAGER_ROUNDS:
            os.sched_yield()  # the peer may need this very core
        else:
            self.progress.inbox.wait(_BUSY_S if busy else _IDLE_S)
