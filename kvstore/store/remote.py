"""The remote tier: the index says who may have a block, that node says whether it has, and its bytes come over UCX.

    locate ──> Offer (the owner leases what it has) ──> post receives ──> Send ──> verify each block ──> host tier

The owner decides: another life, a missing block, another model is a miss. The bytes must have the checksum that came
with the offer, which is the one their writer gave. A node that fails is left alone for a while. Nothing here raises.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import Sequence

import grpc
import grpc.aio

from kvstore.errors import TransferError
from kvstore.keys import BlockKey
from kvstore.store import store_pb2 as pb
from kvstore.store.breaker import Breaker
from kvstore.store.fetch import Fetch
from kvstore.store.host_block import SlotRef
from kvstore.store.locations import Locations, NodeRecord
from kvstore.store.messages import MAX_TENANT_BYTES
from kvstore.store.peer_links import PeerLinks
from kvstore.store.store import TieredStore
from kvstore.store.store_pb2_grpc import StorePeerStub
from kvstore.store.tier import Tier
from kvstore.store.wire import join_keys
from kvstore.transfer.manifest import Subject
from kvstore.transfer.tags import MAX_TICKET_ID

log = logging.getLogger(__name__)

_OWNER = "fetch"
_LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.ABORTED)
_TICKET_BYTES = 128 << 20  # of one fetch: what is late or wrong costs no more than this
_MAX_BREAKERS = 1024


class Remote:
    """Use on the node's loop."""

    def __init__(self, store: TieredStore, locations: Locations, links: PeerLinks, node_id: str) -> None:
        self._store = store
        self._locations = locations
        self._links = links
        self._node_id = node_id
        # Tickets count from a random start: a link that outlives a mistake of ours shares no tag with it.
        self._tickets = itertools.count(secrets.randbelow(MAX_TICKET_ID >> 1) + 1)
        self._breakers: dict[int, Breaker] = {}  # by the peer's incarnation

    async def locate(self, keys: Sequence[BlockKey]) -> int:
        """How many leading keys other nodes have, as far as the index knows."""
        return len(await self._locations.locate(keys))

    def announce(self, tier: Tier, keys: Sequence[BlockKey]) -> None:
        self._locations.announce(tier, keys)

    async def fetch(self, keys: Sequence[BlockKey], parent: BlockKey | None, until_s: float) -> int:
        """Bring leading blocks of what follows `parent` into the host tier, by `until_s`; how many came."""
        located = await self._locations.locate(keys)
        if not located:
            return 0
        peer = located[0]
        run = sum(1 for _ in itertools.takewhile(lambda node: node == peer, located))
        run = min(run, max(1, _TICKET_BYTES // self._store.host.block_bytes))
        breaker = self._breaker(peer)
        if not breaker.allows(time.monotonic()):
            return 0
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(until_s - time.monotonic()):
                count = await self._fetch_from(peer, keys[:run], parent, until_s)
        except (grpc.aio.AioRpcError, grpc.aio.BaseError, TransferError, TimeoutError) as error:
            # A BaseError: the link and then its channel were closed between two calls.
            reason = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
            log.warning("fetching from store node %s failed: %s", peer.node_id, reason or type(error).__name__)
            if isinstance(error, grpc.aio.AioRpcError) and error.code() in _LOST:
                self._links.lost(peer, "it does not answer")
            breaker.failed(time.monotonic())
            return 0
        breaker.succeeded()
        if count:
            num_bytes = count * self._store.host.block_bytes
            self._store.metrics.fetched(Tier.REMOTE, num_bytes, time.monotonic() - began_s)
        return count

    async def _fetch_from(
        self, peer: NodeRecord, keys: Sequence[BlockKey], parent: BlockKey | None, until_s: float
    ) -> int:
        """Raises TransferError or AioRpcError; TimeoutError comes from around it."""
        link = await self._links.dialled(peer)
        stub = self._links.stub(peer.address)
        left_s = until_s - time.monotonic()
        request = pb.OfferRequest(
            node_id=self._node_id, incarnation=peer.incarnation, keys=join_keys(keys), deadline_s=left_s
        )
        offer: pb.OfferReply = await stub.Offer(request, timeout=left_s)
        num_offered = len(offer.checksums)
        self._store.metrics.located(len(keys), len(keys) - min(num_offered, len(keys)))
        if offer.keys != join_keys(keys[:num_offered]):
            raise TransferError("it offers other blocks than it was asked for")
        if len(offer.tenant.encode()) > MAX_TENANT_BYTES:
            raise TransferError("it names a tenant at too great a length")
        refs = self._begin(keys[:num_offered], parent, offer.tenant)
        if not refs:
            return 0
        checksums = list(offer.checksums)[: len(refs)]
        fetch = Fetch(
            Subject(next(self._tickets), content=keys[len(refs) - 1], num_tokens=0, vocab_size=0),
            self._node_id,
            refs,
            checksums,
            self._store.slots,
            link,
            self._links,
            stub,
            self,
            self._store.limits.peer_fence_s,
        )
        fetch.start()
        try:
            await self._send(stub, offer.offer_id, fetch, refs, until_s)
            failure = await fetch.result
        finally:
            fetch.stop("it was given up")  # of one that has ended it is nothing
        if failure is not None:
            raise TransferError(failure)
        return self._store.commit_fetched(Tier.REMOTE, list(zip(refs, checksums, strict=True)))

    async def _send(
        self, stub: StorePeerStub, offer_id: int, fetch: Fetch, refs: Sequence[SlotRef], until_s: float
    ) -> None:
        """Ask for the blocks; the bytes tell the rest."""
        request = pb.SendRequest(
            node_id=self._node_id,
            offer_id=offer_id,
            ticket_id=fetch.ticket_id,
            generations=[ref.generation for ref in refs],
            deadline_s=until_s - time.monotonic(),
        )
        await stub.Send(request, timeout=until_s - time.monotonic())

    def _begin(self, keys: Sequence[BlockKey], parent: BlockKey | None, tenant: str) -> list[SlotRef]:
        """Slots for a leading run."""
        refs: list[SlotRef] = []
        for key in keys:
            ref = self._store.begin_fetch(_OWNER, key, parent, tenant)
            if ref is None:
                break
            refs.append(ref)
            parent = key
        self._store.publish_removed()
        return refs

    def drained(self, refs: Sequence[SlotRef]) -> None:
        """Nothing lands in these slots of a failed fetch any more."""
        for ref in refs:
            self._store.host.abandon(ref)

    def lied(self) -> None:
        """A block came with other bytes than were offered."""
        self._store.metrics.corrupt(Tier.REMOTE)

    def _breaker(self, peer: NodeRecord) -> Breaker:
        if len(self._breakers) >= _MAX_BREAKERS:
            self._breakers.clear()
        return self._breakers.setdefault(peer.incarnation, Breaker(1, 1.0, 30.0))
