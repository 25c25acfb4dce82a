"""What other nodes fetch from this one: offered blocks stay leased until they are sent, or until the lease ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial

import numpy as np

from kvstore.errors import TransferError
from kvstore.keys import BlockKey
from kvstore.store.host_block import HostBlock
from kvstore.store.loads import Loaded
from kvstore.store.peer_links import PeerLinks
from kvstore.store.store import TieredStore
from kvstore.transfer.loop_link import LoopLink
from kvstore.transfer.session import Fenced, SendAction, SendBlock, SendManifest, SendSession, SendState
from kvstore.transfer.tags import MANIFEST, MAX_BLOCKS, MAX_TICKET_ID, message_tag
from kvstore.transfer.transport import Buffer, Completion, Outcome

_MAX_ENDED = 4096  # tickets that are remembered
_LOAD_S = 5.0  # for what is on disk to be read, whatever the asker would wait


class Sending:
    """One ticket on its way out, the hands of SendSession. Use on the asyncio loop only."""

    def __init__(
        self, ticket_id: int, blocks: Sequence[HostBlock], slots: Sequence[Buffer], generations: Sequence[int],
        peer: LoopLink, links: PeerLinks,
    ) -> None:  # fmt: skip
        self.drained = asyncio.Event()
        self._fenced: tuple[int, ...] = ()
        self._ticket_id = ticket_id
        self._blocks = blocks
        self._slots = slots
        self._peer = peer
        self._links = links
        self._session = SendSession(ticket_id, generations)

    def start(self) -> None:
        for ordinal, block in enumerate(self._blocks):
            self._do(self._session.ready(ordinal, block.checksum))
        if self._session.state is SendState.SENDING:
            self._do(self._session.finish(self._blocks[-1].key, ()))

    @property
    def done(self) -> bool:
        return self._session.state is SendState.DONE

    def sent(self) -> tuple[int, ...]:
        """Ordinals that were sent; to be asked once it is drained."""
        self._do(self._session.fence())
        return self._fenced

    async def stop(self, timeout_s: float) -> None:
        """Send no more; returns when nothing reads the blocks any more."""
        self._do(self._session.abort())
        await self.wait(timeout_s)

    async def wait(self, timeout_s: float) -> None:
        """Until nothing reads the blocks any more; one that is not done by then has its link closed."""
        try:
            async with asyncio.timeout(timeout_s):
                await self.drained.wait()
        except TimeoutError:
            self._do(self._session.abort())
            await self._links.close(self._peer, "a send did not end")
            await self.drained.wait()  # a closed link has completed everything

    def _do(self, actions: Sequence[SendAction]) -> None:
        for action in actions:
            match action:
                case SendBlock(ordinal):
                    self._send(ordinal, self._slots[self._blocks[ordinal].ref.slot])
                case SendManifest(data):
                    self._send(MANIFEST, np.frombuffer(data, np.uint8))
                case Fenced(sent):
                    self._fenced = sent
                case _:
                    pass  # a failure shows in `done`; unpinned is drained
        if self._session.state in (SendState.DONE, SendState.STOPPED):
            self.drained.set()

    def _send(self, ordinal: int, data: Buffer) -> None:
        try:
            self._peer.send(message_tag(self._ticket_id, ordinal), data, partial(self._ended, ordinal))
        except TransferError as error:
            # Told like any other end of a send, and not from inside the call that asked for it.
            failed = Completion(0, Outcome.FAILED, 0, str(error))
            asyncio.get_running_loop().call_soon(self._ended, ordinal, failed)

    def _ended(self, ordinal: int, completion: Completion) -> None:
        self._do(self._session.ended(ordinal, completion.outcome))
        if completion.outcome is Outcome.FAILED:
            self._links.close(self._peer, f"a send failed: {completion.error}")


class Offers:
    """Use on the node's loop."""

    def __init__(self, store: TieredStore, links: PeerLinks) -> None:
        self._store = store
        self._links = links
        self._offers: dict[int, tuple[str, Loaded, float]] = {}  # with the asker and the end of the lease
        self._last_offer = 0
        self._sending: dict[tuple[str, int], Sending] = {}
        self._ended: dict[tuple[str, int], tuple[int, ...]] = {}  # what was sent under tickets, oldest first
        self._tasks: set[asyncio.Task[None]] = set()

    async def offer(self, node_id: str, keys: Sequence[BlockKey], deadline_s: float) -> tuple[int, list[HostBlock]]:
        """Lease the leading run of `keys` for another node: what is in this machine's own tiers. (0, []) is none."""
        now_s = time.monotonic()
        self._offers = {number: offer for number, offer in self._offers.items() if offer[2] > now_s}
        if len(self._offers) >= self._store.limits.max_offers:
            return 0, []
        wait_s = min(max(deadline_s, 0.0) / 2, _LOAD_S)
        loaded = await self._store.load(f"node {node_id}", keys[:MAX_BLOCKS], wait_s, from_peers=False)
        if not loaded.blocks:
            return 0, []
        self._last_offer += 1
        self._offers[self._last_offer] = (node_id, loaded, now_s + self._store.limits.lease_s)
        return self._last_offer, loaded.blocks

    async def send(
        self, node_id: str, offer_id: int, ticket_id: int, generations: Sequence[int], deadline_s: float
    ) -> None:
        """Send the first blocks of an offer, one for each generation of the asker's slots, and the manifest.

        Raises:
            TransferError: no such offer or link, or not everything was sent.
        """
        asker, loaded, _ = self._offers.get(offer_id, ("", Loaded(0, [], b""), 0.0))
        ticket = (node_id, ticket_id)
        peer = self._links.accepted(node_id)
        if asker != node_id or peer is None:
            raise TransferError("there is no such offer, or no link to send it through")
        if not 0 < len(generations) <= len(loaded.blocks) or not 0 < ticket_id <= MAX_TICKET_ID:
            raise TransferError("the ticket is malformed")
        if ticket in self._sending or ticket in self._ended:
            raise TransferError("the ticket has been used or fenced")
        del self._offers[offer_id]
        blocks = loaded.blocks[: len(generations)]
        sending = Sending(ticket_id, blocks, self._store.slots, generations, peer, self._links)
        self._sending[ticket] = sending
        wait_s = min(max(deadline_s, 0.0), self._store.limits.max_load_s)
        # A task of its own: the blocks are read until it has ended, also when the asker has hung up.
        task = asyncio.create_task(self._send(ticket, sending, loaded.lease_id, wait_s), name=f"send {ticket_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.shield(task)
        if not sending.done:
            raise TransferError("not everything could be sent")

    async def _send(self, ticket: tuple[str, int], sending: Sending, lease_id: int, wait_s: float) -> None:
        try:
            sending.start()
            await sending.wait(wait_s)
        finally:
            del self._sending[ticket]
            self._note_end(ticket, sending.sent())
            self._store.release(lease_id)

    async def fence(self, node_id: str, ticket_id: int) -> tuple[int, ...]:
        """Ordinals that were sent under this ticket; no other will be."""
        ticket = (node_id, ticket_id)
        sending = self._sending.get(ticket)
        if sending is not None:
            await sending.stop(self._store.limits.peer_fence_s)
            return sending.sent()
        if ticket not in self._ended:
            self._note_end(ticket, ())  # a request to send that comes later is refused
        return self._ended[ticket]

    async def shut_down(self) -> None:
        """Wait for what is being sent; each has a deadline."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _note_end(self, ticket: tuple[str, int], sent: tuple[int, ...]) -> None:
        self._ended[ticket] = sent
        if len(self._ended) > _MAX_ENDED:
            del self._ended[next(iter(self._ended))]
