"""The transport seam: how bytes of one worker's memory reach another's.

    Transport ── open() ──> Link ── connect(peer address) ── send / receive / cancel ──> Completion ── close()

A link joins two processes and is isolated from every other link: once `close` has returned, nothing that the peer sent
or will send can land in memory posted through it. This is the "proven closed connection" that frees quarantined blocks.

Receives are posted by the receiver and matched by tag; a sender cannot write where nothing was posted. All calls are
thread-safe, return at once and do no I/O of their own, `close` excepted. Completions arrive on the transport's thread,
one per `send` or `receive` accepted, in any order; the handler must not block.

One suite (tests/kvstore/transfer/test_transport_contract.py) holds for all implementations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Buffer = NDArray[np.uint8]  # one-dimensional, contiguous; writable for a receive


@dataclass(frozen=True, slots=True)
class DeviceBuffer:
    """A run of a GPU's memory; `owner` keeps it alive. Transports that cannot read it raise ValueError."""

    pointer: int
    nbytes: int
    owner: object
    device: int = 0  # its number

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        """Version 3, as numba's documentation has it; the stream is ours to wait for before we send."""
        return {"shape": (self.nbytes,), "typestr": "|u1", "data": (self.pointer, False), "version": 3}


Memory = Buffer | DeviceBuffer


class Outcome(Enum):
    DONE = "done"  # all bytes moved
    CANCELLED = "cancelled"  # by `cancel` before a byte moved: the buffer was not touched and never will be
    TRUNCATED = "truncated"  # the message was larger than the buffer
    FAILED = "failed"  # the peer or the network; of a receive, the buffer's content is undefined but no longer written


@dataclass(frozen=True, slots=True)
class Completion:
    """The end of one operation: from now on the transport does not touch its buffer."""

    operation: int
    outcome: Outcome
    num_bytes: int
    error: str = ""


CompletionHandler = Callable[[Completion], None]


class Link(Protocol):
    """One end of a connection between two processes. `send` before `connect` is an error of the caller."""

    address: bytes  # hand it to the peer's `connect`

    def connect(self, peer_address: bytes) -> None:
        """Raises TransferError if the address cannot be used, LinkClosed after `close`."""
        ...

    def send(self, tag: int, data: Memory) -> int:
        """Start sending; returns the operation. The buffer stays unchanged until its completion. Raises LinkClosed."""
        ...

    def receive(self, tag: int, into: Memory) -> int:
        """Post a receive for one message with exactly this 64-bit tag; returns the operation. Raises LinkClosed."""
        ...

    def cancel(self, operation: int) -> None:
        """Ask for the operation to end early. Its completion still comes: CANCELLED, or how it ended before."""
        ...

    def describe(self) -> str:
        """Which transports the connection really uses, for people; empty while unknown."""
        ...

    def close(self) -> None:
        """Complete every open operation (FAILED) and let go of the connection. Idempotent; returns when proven."""
        ...


class Transport(Protocol):
    """One process's end of the data plane, with a progress thread of its own."""

    name: str

    def open(self, handler: CompletionHandler, *, same_host: bool) -> Link:
        """A new, unconnected link; `same_host` chooses settings (shared memory, or TCP/RDMA with error handling)."""
        ...

    def close(self) -> None:
        """Close all links and end the thread. Idempotent."""
        ...
