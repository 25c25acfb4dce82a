"""One push: blocks of a prompt on their way to the decode worker that a ticket names. The hands of SendSession."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from kvstore.errors import TransferError
from kvstore.keys import BlockKey
from kvstore.transfer.session import Fenced, SendAction, SendBlock, SendFailed, SendManifest, SendSession, SendState
from kvstore.transfer.tags import MANIFEST, MAX_BLOCKS, MAX_TICKET_ID, message_tag
from kvstore.transfer.transport import Completion, Memory, Outcome
from pdserve.protocol import worker_pb2 as pb
from pdserve.worker.config import WorkerLimits
from pdserve.worker.links import PROBE_TICKET, LinkTable, PeerLink
from pdserve.worker.memory import BlockMemory


class TicketId(NamedTuple):
    """Names a ticket everywhere: ticket numbers are unique within one life of one decode worker."""

    decode_worker_id: str
    decode_incarnation: int
    ticket_id: int


class Push:
    """Use on the asyncio loop only. `ready`, `complete` and `start` come in any order.

    `over(error)` is called once, when nothing reads the blocks any more: None if all was sent, else the reason.
    """

    def __init__(
        self, links: LinkTable, memory: BlockMemory, limits: WorkerLimits, over: Callable[[str | None], None]
    ) -> None:
        self._links = links
        self._memory = memory
        self._over = over
        self._limits = limits
        self._deadline_s = time.monotonic() + limits.handoff_s
        self._block_ids: Sequence[int] = ()  # ready, from the sequence's first block on
        self._content: BlockKey | None = None  # known once all blocks are ready
        self._tokens: tuple[int, ...] = ()
        self._session: SendSession | None = None
        self._ticket = pb.Ticket()
        self._peer: PeerLink | None = None
        self._error: str | None = None
        self._drained = asyncio.Event()
        self._fenced: tuple[int, ...] = ()
        self.num_bytes = 0

    def ready(self, block_ids: Sequence[int]) -> None:
        """These blocks of the sequence, from its first on, hold their final bytes."""
        self._block_ids = block_ids
        self._advance()

    def complete(self, content: BlockKey, output_token_ids: tuple[int, ...]) -> None:
        """All blocks are ready, the KV of `content`; these are the output tokens so far."""
        self._content, self._tokens = content, output_token_ids
        self._advance()

    def start(self, ticket: pb.Ticket, peer: PeerLink) -> None:
        """Send under this ticket. Raises TransferError if it cannot be one of ours."""
        if self._session is not None:
            raise TransferError("this prompt is being pushed under another ticket")
        num_blocks = len(ticket.block_ids)
        fits = num_blocks <= MAX_BLOCKS and PROBE_TICKET < ticket.ticket_id <= MAX_TICKET_ID
        if num_blocks != len(ticket.generations) or not fits:
            raise TransferError("the ticket is malformed")
        self._ticket, self._peer = ticket, peer
        self._deadline_s = time.monotonic() + self._limits.handoff_s
        self._session = SendSession(ticket.ticket_id, ticket.generations)
        self._advance()

    def overdue(self, now_s: float) -> bool:
        return now_s > self._deadline_s

    async def fence(self) -> pb.FenceReply:
        """Stop for good; what was sent, once nothing is under way."""
        if self._session is not None:
            self._do(self._session.fence())
            await self._wait_drained()
        return pb.FenceReply(sent_ordinals=self._fenced)

    def sent(self) -> tuple[int, ...]:
        """Ordinals that were sent; to be asked once `over` was called."""
        assert self._session is not None
        self._do(self._session.fence())
        return self._fenced

    async def stop(self) -> None:
        """Stop for good; returns when nothing reads the blocks any more."""
        if self._session is not None:
            self._do(self._session.abort())
            await self._wait_drained()

    async def _wait_drained(self) -> None:
        try:
            async with asyncio.timeout(self._limits.drain_s):
                await self._drained.wait()
        except TimeoutError:
            assert self._peer is not None
            await self._links.close(self._peer, "a send did not end")
            await self._drained.wait()  # a closed link has completed everything

    def _advance(self) -> None:
        """Send what has become ready."""
        session = self._session
        if session is None:
            return
        first, count = self._ticket.first_ordinal, len(self._ticket.block_ids)
        ready = range(session.num_ready, min(count, len(self._block_ids) - first))
        if ready and session.state is SendState.SENDING:
            checksums = self._memory.checksums([self._block_ids[first + ordinal] for ordinal in ready])
            for ordinal, checksum in zip(ready, checksums, strict=True):
                self._do(session.ready(ordinal, checksum))
        if self._content is None or session.state is not SendState.SENDING:
            return
        if session.num_ready == count and first + count == len(self._block_ids):
            self._do(session.finish(self._content, self._tokens))
        else:
            has = len(self._block_ids)
            self._error = f"the ticket asks for blocks {first} to {first + count}, the prompt has {has}"
            self._do(session.abort())

    def _do(self, actions: Sequence[SendAction]) -> None:
        for action in actions:
            match action:
                case SendBlock(ordinal):
                    self._send(ordinal, self._memory.block(self._block_ids[self._ticket.first_ordinal + ordinal]))
                case SendManifest(data):
                    self._send(MANIFEST, np.frombuffer(data, np.uint8))
                case SendFailed(reason):
                    self._error = reason
                case Fenced(sent):
                    self._fenced = sent
                case _:  # Unpin
                    assert self._session is not None
                    stopped = None if self._session.state is SendState.DONE else self._error or "the push was stopped"
                    asyncio.get_running_loop().call_soon(self._over, stopped)
        if self._session is not None and self._session.state in (SendState.DONE, SendState.STOPPED):
            self._drained.set()

    def _send(self, ordinal: int, data: Memory) -> None:
        assert self._peer is not None
        try:
            self._peer.send(message_tag(self._ticket.ticket_id, ordinal), data, partial(self._ended, ordinal))
        except TransferError as error:
            # Told like any other end of a send, and not from inside the call that asked for it.
            failed = Completion(0, Outcome.FAILED, 0, str(error))
            asyncio.get_running_loop().call_soon(self._ended, ordinal, failed)
        else:
            self.num_bytes += data.nbytes if ordinal != MANIFEST else 0

    def _ended(self, ordinal: int, completion: Completion) -> None:
        assert self._session is not None
        assert self._peer is not None
        self._do(self._session.ended(ordinal, completion.outcome))
        if completion.outcome is Outcome.FAILED:
            self._links.close(self._peer, f"a send failed: {completion.error}")
