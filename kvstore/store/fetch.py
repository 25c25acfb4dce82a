"""One fetch: offered blocks of another node landing in host slots of ours. The hands of ReceiveSession."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import grpc.aio
import numpy as np

from kvstore.errors import TransferError
from kvstore.store import store_pb2 as pb
from kvstore.store.host_block import SlotRef
from kvstore.store.peer_links import PeerLinks
from kvstore.store.store_pb2_grpc import StorePeerStub
from kvstore.transfer.checksum import block_checksum
from kvstore.transfer.loop_link import LoopLink
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
from kvstore.transfer.transport import Buffer, Completion, Outcome

log = logging.getLogger(__name__)


class FetchListener(Protocol):
    """Called on the loop."""

    def drained(self, refs: Sequence[SlotRef]) -> None:
        """Nothing lands in these slots of a failed fetch any more."""
        ...

    def lied(self) -> None:
        """A block came with other bytes than were offered."""
        ...


class Fetch:
    """Use on the asyncio loop only. The content of `subject` is the key of the last block, which names all before it.

    `result` is done once, with None if every block is verified, else with why not."""

    def __init__(
        self,
        subject: Subject,
        me: str,
        refs: Sequence[SlotRef],
        checksums: Sequence[int],
        slots: Sequence[Buffer],
        peer: LoopLink,
        links: PeerLinks,
        stub: StorePeerStub,
        listener: FetchListener,
        fence_s: float,
    ) -> None:
        self.result: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self.ticket_id = subject.ticket_id
        self._me = me
        self._refs = {ref.slot: ref for ref in refs}
        self._buffers = [slots[ref.slot] for ref in refs]
        self._checksums = checksums  # as offered: the writer's own
        self._peer = peer
        self._links = links
        self._stub = stub
        self._listener = listener
        self._fence_s = fence_s
        self._manifest: Buffer = np.empty(manifest_bytes(len(refs), 0), np.uint8)
        expected = [ExpectedBlock(ref.slot, ref.generation) for ref in refs]
        self._session = ReceiveSession(subject, peer.peer_id, expected)
        self._operations: dict[int, int] = {}
        self._fence: asyncio.Task[None] | None = None
        self._drained = asyncio.Event()

    def start(self) -> None:
        """Post all receives."""
        for ordinal, buffer in enumerate((*self._buffers, self._manifest)):
            number = ordinal if ordinal < len(self._buffers) else MANIFEST
            tag = message_tag(self.ticket_id, number)
            try:
                self._operations[number] = self._peer.receive(tag, buffer, partial(self._ended, number))
            except TransferError as error:
                failed = Completion(0, Outcome.FAILED, 0, str(error))
                asyncio.get_running_loop().call_soon(self._ended, number, failed)

    def stop(self, reason: str) -> None:
        """Give up. Idempotent; slots are told as drained when they are."""
        self._do(self._session.abort(reason))

    def _ended(self, ordinal: int, completion: Completion) -> None:
        self._operations.pop(ordinal, None)
        if completion.outcome is not Outcome.DONE:
            if completion.outcome is Outcome.FAILED:
                self._links.close(self._peer, f"a receive failed: {completion.error}")
            self._do(self._session.ended_badly(ordinal, completion.outcome))
        elif ordinal == MANIFEST:
            self._do(self._session.manifest_landed(self._manifest[: completion.num_bytes].tobytes()))
        else:
            checksum = block_checksum(self._buffers[ordinal])
            if checksum == self._checksums[ordinal]:
                self._do(self._session.block_landed(ordinal, checksum))
            else:
                if self._session.state is ReceiveState.RECEIVING:
                    self._listener.lied()
                self._do(self._session.ended_badly(ordinal, Outcome.FAILED))

    def _do(self, actions: Sequence[ReceiveAction]) -> None:
        for action in actions:
            match action:
                case Commit():
                    self._settle(None)
                case Fail(reason):
                    self._settle(reason)
                case AskFence():
                    self._fence = asyncio.ensure_future(self._ask_fence())
                case CancelReceives(ordinals):
                    for ordinal in ordinals:
                        self._peer.cancel(self._operations[ordinal])
                case Release(block_ids):
                    self._listener.drained([self._refs[slot] for slot in block_ids])
        if self._session.state is ReceiveState.DRAINED:
            self._drained.set()

    def _settle(self, result: str | None) -> None:
        if not self.result.done():
            self.result.set_result(result)

    async def _ask_fence(self) -> None:
        """Have the sender say what it sent, and wait until it is here; or close the link, which ends every receive."""
        request = pb.FenceRequest(node_id=self._me, ticket_id=self.ticket_id)
        try:
            reply = await self._stub.Fence(request, timeout=self._fence_s)
        except (grpc.aio.AioRpcError, grpc.aio.BaseError) as error:  # the latter: the channel was closed before
            reason = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
            log.warning("store node %s does not acknowledge a fence: %s", self._peer.peer_id, reason)
            await self._links.close(self._peer, "a fence was not acknowledged")
            return
        self._do(self._session.fenced(reply.sent_ordinals))
        try:
            async with asyncio.timeout(self._fence_s):
                await self._drained.wait()
        except TimeoutError:
            self._links.close(self._peer, "what was sent before a fence did not arrive")
