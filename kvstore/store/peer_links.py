"""Links to other nodes, dialled when a block is fetched and kept until the peer is lost.

    DIALLING ── Connect answered ──> UP ── peer died, an operation failed or was late ──> CLOSED, dialled anew
                                     └─── place is needed, and it was used least recently ──^

The node that fetches dials; the one that serves accepts. Closing is the proof that nothing lands any more: every open
operation of a closed link completes as FAILED first. On one machine the peer's death is learnt from its pidfd.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import grpc
import grpc.aio

from kvstore.control_plane import IN_THE_CLEAR, KEEPALIVE, ControlPlane
from kvstore.errors import TransferError
from kvstore.store import store_pb2 as pb
from kvstore.store.geometry import Geometry
from kvstore.store.locations import NodeRecord
from kvstore.store.store_pb2_grpc import StorePeerStub
from kvstore.transfer.loop_link import LoopLink
from kvstore.transfer.transport import Transport

log = logging.getLogger(__name__)

MAX_LINKS = 256
_CALLS_END_S = 30.0  # a call on a channel that nobody needs any more may still end by itself
CHANNEL_OPTIONS = (
    *KEEPALIVE,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


class PeerLinks:
    """All links of this node. Use on the asyncio loop only."""

    def __init__(
        self,
        me: NodeRecord,
        geometry: Geometry,
        transport: Transport,
        dial_s: float,
        control: ControlPlane = IN_THE_CLEAR,
    ) -> None:
        self._me = me
        self._geometry = geometry
        self._transport = transport
        self._dial_s = dial_s
        self._control = control
        self._loop = asyncio.get_running_loop()
        self._dialled: dict[int, LoopLink] = {}  # by the peer's incarnation
        self._addresses: dict[int, str] = {}  # of those
        self._accepted: dict[str, LoopLink] = {}  # by the peer's node id
        self._dialling: dict[int, asyncio.Lock] = {}
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._closing: set[asyncio.Future[None]] = set()
        self._dropping: set[asyncio.Future[None]] = set()  # channels, with their last calls

    def stub(self, address: str) -> StorePeerStub:
        """A client for another node's service."""
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = self._control.channel(address, CHANNEL_OPTIONS)
        return StorePeerStub(channel)

    def accepted(self, node_id: str) -> LoopLink | None:
        link = self._accepted.pop(node_id, None)
        if link is not None:
            self._accepted[node_id] = link  # the last one to be closed for place
        return link

    async def dialled(self, peer: NodeRecord) -> LoopLink:
        """The link to fetch from this life of a node through. Raises TransferError or AioRpcError."""
        async with self._dialling.setdefault(peer.incarnation, asyncio.Lock()):
            link = self._dialled.pop(peer.incarnation, None)
            if link is None:
                return await self._dial(peer)
            self._dialled[peer.incarnation] = link  # the last one to be closed for place
            return link

    def lost(self, peer: NodeRecord, reason: str) -> None:
        """It answers no call, or as one that does not know us: with nothing under way its link would stay."""
        if (link := self._dialled.get(peer.incarnation)) is not None:
            self.close(link, reason)

    async def _dial(self, peer: NodeRecord) -> LoopLink:
        await self._make_place(self._dialled)
        same_host = self._same_host(peer.host_id, peer.address)
        link = await self._open(peer.node_id, same_host=same_host)
        self._dialled[peer.incarnation], self._addresses[peer.incarnation] = link, peer.address
        try:
            request = pb.ConnectRequest(
                node_id=self._me.node_id,
                incarnation=self._me.incarnation,
                address=self._me.address,
                host_id=self._me.host_id,
                transport=self._transport.name,
                link_address=link.link.address,
                fingerprint=self._geometry.fingerprint,
                block_bytes=self._geometry.block_bytes,
                pid=os.getpid(),
            )
            reply: pb.ConnectReply = await self.stub(peer.address).Connect(request, timeout=self._dial_s)
            if reply.incarnation != peer.incarnation:
                raise TransferError(f"{peer.node_id} has restarted since it was listed")
            link.link.connect(reply.link_address)
            if same_host:
                self._watch(link, reply.pid)
        except BaseException:
            await self.close(link, "dialling failed")
            raise
        log.info("linked to store node %s: %s", peer.node_id, link.link.describe())
        return link

    async def accept(self, request: pb.ConnectRequest) -> pb.ConnectReply:
        """Raises TransferError, with what differs, if the two nodes do not fit."""
        if request.transport != self._transport.name:
            raise TransferError(f"{self._me.node_id} moves blocks by {self._transport.name}, not {request.transport}")
        if (request.fingerprint, request.block_bytes) != (self._geometry.fingerprint, self._geometry.block_bytes):
            raise TransferError(f"{request.node_id} and {self._me.node_id} hold blocks of different models or layouts")
        if (older := self._accepted.get(request.node_id)) is not None:
            await self.close(older, "the peer dials again")
        await self._make_place(self._accepted)
        same_host = self._same_host(request.host_id, request.address)
        link = await self._open(request.node_id, same_host=same_host)
        self._accepted[request.node_id] = link
        try:
            link.link.connect(request.link_address)
            if same_host:
                self._watch(link, request.pid)
        except TransferError:
            await self.close(link, "connecting back failed")
            raise
        return pb.ConnectReply(incarnation=self._me.incarnation, link_address=link.link.address, pid=os.getpid())

    def close(self, link: LoopLink, reason: str) -> asyncio.Future[None]:
        """Close for good; done once it is proven that nothing lands any more. Open operations complete as FAILED."""
        if link.closing is None:
            log.info("closing the link with store node %s: %s", link.peer_id, reason)
            for incarnation in [one for one, other in self._dialled.items() if other is link]:
                del self._dialled[incarnation]
                self._dialling.pop(incarnation, None)
                self._drop_channel(self._addresses.pop(incarnation))
            if self._accepted.get(link.peer_id) is link:
                del self._accepted[link.peer_id]
            self._closing.add(closing := link.close())
            closing.add_done_callback(self._closing.discard)
        return asyncio.shield(link.close())  # a call that is cancelled while it waits must not undo it for all

    async def _make_place(self, links: Mapping[Any, LoopLink]) -> None:
        """Of one that is gone nobody may ever ask again; one that is not is dialled anew."""
        while len(links) >= MAX_LINKS:
            await self.close(next(iter(links.values())), "another node needs its place")

    def _drop_channel(self, address: str) -> None:
        """A node that comes back has another address, as a rule; a channel to the old one would dial it for ever."""
        if address in self._channels and address not in self._addresses.values():
            dropping = asyncio.ensure_future(self._channels.pop(address).close(_CALLS_END_S))
            self._dropping.add(dropping)
            dropping.add_done_callback(self._dropping.discard)

    async def shut_down(self) -> None:
        """Close all links, channels and the transport."""
        for link in (*self._dialled.values(), *self._accepted.values()):
            self.close(link, "this node is ending")
        for dropping in self._dropping:
            dropping.cancel()
        await asyncio.gather(*self._closing, *self._dropping, return_exceptions=True)
        for channel in self._channels.values():
            await channel.close(None)
        await self._loop.run_in_executor(None, self._transport.close)

    def _same_host(self, peer_host_id: str, peer_address: str) -> bool:
        """Nodes of one machine that use different addresses are treated as what they are set up as: two machines."""
        own_host, peer_host = (address.rpartition(":")[0] for address in (self._me.address, peer_address))
        return peer_host_id == self._me.host_id and peer_host == own_host

    async def _open(self, node_id: str, *, same_host: bool) -> LoopLink:
        make = partial(LoopLink, node_id, self._transport, self._loop, same_host=same_host)
        return await self._loop.run_in_executor(None, make)

    def _watch(self, link: LoopLink, pid: int) -> None:
        """Close the link as soon as the peer's process is gone. Raises TransferError."""
        link.watch(pid, lambda: self.close(link, "the peer's process has ended"))
