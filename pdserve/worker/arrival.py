"""One arrival: blocks of a sequence landing from a prefill worker. The hands of ReceiveSession."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import grpc.aio
import numpy as np

from kvstore.errors import TransferError
from kvstore.pool import BlockRef
from kvstore.transfer.manifest import Subject, manifest_bytes
from kvstore.transfer.session import (
    AskFence,
    CancelReceives,
    Commit,
    ExpectedBlock,
    Fail,
    ReceiveAction,
    ReceiveSession,
    ReceiveState,
    Release,
)
from kvstore.transfer.tags import MANIFEST, message_tag
from kvstore.transfer.transport import Buffer, Completion, Memory, Outcome
from pdserve.protocol import worker_pb2 as pb
from pdserve.worker.links import LinkTable, PeerLink
from pdserve.worker.memory import BlockMemory

log = logging.getLogger(__name__)


class ArrivalListener(Protocol):
    """Called on the loop, from inside the arrival's own methods, in this order: one of the first two, then drained."""

    def committed(self, arrival: Arrival, output_token_ids: tuple[int, ...]) -> None:
        """All blocks are verified; these are all output tokens so far."""
        ...

    def failed(self, arrival: Arrival, reason: str) -> None: ...

    def landed_late(self) -> None:
        """A message of a failed arrival; it changes nothing."""
        ...

    def drained(self, refs: list[BlockRef]) -> None:
        """Nothing lands in these blocks of a failed arrival any more."""
        ...


class Arrival:
    """Use on the asyncio loop only. Times in seconds."""

    def __init__(
        self,
        ticket: pb.Ticket,
        subject: Subject,
        blocks: Sequence[BlockRef],
        peer: PeerLink,
        links: LinkTable,
        memory: BlockMemory,
        listener: ArrivalListener,
        deadline_s: float,
        fence_s: float,
    ) -> None:
        self.blocks = list(blocks)
        self.deadline_s = deadline_s
        self.transfer_s = 0.0  # from the ticket until the last byte landed
        self.verify_s = 0.0  # in checksums
        self._ticket = ticket
        self._peer = peer
        self._links = links
        self._memory = memory
        self._listener = listener
        self._fence_s = fence_s
        self._began_s = time.monotonic()
        self._operations: dict[int, int] = {}
        self._landed: list[int] = []  # ordinals to be verified in the loop's next turn, together
        self._manifest: Buffer = np.empty(manifest_bytes(len(blocks), subject.num_tokens), np.uint8)
        expected = [ExpectedBlock(ref.block_id, ref.generation) for ref in blocks]
        self._session = ReceiveSession(subject, peer.peer_id, expected)
        self._refs = {ref.block_id: ref for ref in blocks}
        self._fence: asyncio.Task[None] | None = None
        self._drained = asyncio.Event()

    def start(self) -> None:
        """Post all receives."""
        for ordinal, ref in enumerate(self.blocks):
            self._receive(ordinal, self._memory.block(ref.block_id))
        self._receive(MANIFEST, self._manifest)

    def stop(self, reason: str) -> None:
        """The request is over. Idempotent; blocks are told as drained when they are."""
        self._do(self._session.abort(reason))

    def _receive(self, ordinal: int, into: Memory) -> None:
        tag = message_tag(self._ticket.ticket_id, ordinal)
        try:
            self._operations[ordinal] = self._peer.receive(tag, into, partial(self._ended, ordinal))
        except TransferError as error:
            failed = Completion(0, Outcome.FAILED, 0, str(error))
            asyncio.get_running_loop().call_soon(self._ended, ordinal, failed)

    def _ended(self, ordinal: int, completion: Completion) -> None:
        self._operations.pop(ordinal, None)
        if completion.outcome is not Outcome.DONE:
            if completion.outcome is Outcome.FAILED:
                self._links.close(self._peer, f"a receive failed: {completion.error}")
            self._do(self._session.ended_badly(ordinal, completion.outcome))
            return
        if self._session.state is not ReceiveState.RECEIVING:
            self._listener.landed_late()
        self.transfer_s = time.monotonic() - self._began_s
        if ordinal == MANIFEST:
            self._do(self._session.manifest_landed(self._manifest[: completion.num_bytes].tobytes()))
            return
        if not self._landed:
            asyncio.get_running_loop().call_soon(self._verify)
        self._landed.append(ordinal)

    def _verify(self) -> None:
        """A GPU hashes many blocks in the time of one."""
        began_s = time.monotonic()
        landed, self._landed = self._landed, []
        try:
            checksums = list(self._memory.checksums([self.blocks[ordinal].block_id for ordinal in landed]))
        except Exception:  # a GPU without a byte to spare, say: the blocks must be let go all the same
            log.exception("blocks of %s cannot be verified", self._peer.peer_id)
            for ordinal in landed:
                self._do(self._session.ended_badly(ordinal, Outcome.FAILED))
            return
        self.verify_s += time.monotonic() - began_s
        for ordinal, checksum in zip(landed, checksums, strict=True):
            self._do(self._session.block_landed(ordinal, checksum))

    def _do(self, actions: Sequence[ReceiveAction]) -> None:
        for action in actions:
            match action:
                case Commit(output_token_ids):
                    self._listener.committed(self, output_token_ids)
                case Fail(reason):
                    self._listener.failed(self, reason)
                case AskFence():
                    self._fence = asyncio.ensure_future(self._ask_fence())
                case CancelReceives(ordinals):
                    for ordinal in self._operations.keys() & ordinals:
                        self._peer.cancel(self._operations[ordinal])
                case Release(block_ids):
                    self._listener.drained([self._refs[block_id] for block_id in block_ids])
        if self._session.state is ReceiveState.DRAINED:
            self._drained.set()

    async def _ask_fence(self) -> None:
        """Have the sender say what it sent, and wait until it is here.

        A peer that does not answer, or whose messages do not come, has its link closed, which ends every receive.
        """
        request = pb.FenceRequest(
            decode_worker_id=self._ticket.decode_worker_id,
            decode_incarnation=self._ticket.decode_incarnation,
            ticket_id=self._ticket.ticket_id,
        )
        try:
            reply = await self._links.stub(self._peer.address).Fence(request, timeout=self._fence_s)
        except grpc.aio.AioRpcError as error:
            log.warning("%s does not acknowledge a fence: %s", self._peer.peer_id, error.details())
            await self._links.close(self._peer, "a fence was not acknowledged")
            return
        self._do(self._session.fenced(reply.sent_ordinals))
        try:
            async with asyncio.timeout(self._fence_s):
                await self._drained.wait()
        except TimeoutError:
            self._links.close(self._peer, "what was sent before a fence did not arrive")
