"""The gRPC edge of a node towards other nodes and routers: links, offers, events. What a peer sends is checked."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio

from kvstore.errors import TransferError
from kvstore.store import store_pb2 as pb
from kvstore.store.edge import Context, keys_of
from kvstore.store.opened import NodeState, PeerSide
from kvstore.store.store_pb2_grpc import StorePeerServicer
from kvstore.store.wire import join_keys

_MAX_NODE_ID = 64


class PeerService(StorePeerServicer):
    def __init__(self, state: NodeState) -> None:
        self._state = state

    async def Connect(self, request: pb.ConnectRequest, context: Context) -> pb.ConnectReply:
        side = await self._side(request.node_id, context)
        try:
            return await side.links.accept(request)
        except TransferError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
            raise

    async def Offer(self, request: pb.OfferRequest, context: Context) -> pb.OfferReply:
        side = await self._side(request.node_id, context)
        await self._check_life(request.incarnation, context)
        keys = await keys_of(request.keys, context)
        offer_id, blocks = await side.offers.offer(request.node_id, keys, request.deadline_s)
        return pb.OfferReply(
            offer_id=offer_id,
            keys=join_keys([block.key for block in blocks]),
            checksums=[block.checksum for block in blocks],
            tenant=blocks[0].tenant if blocks else "",
        )

    async def Send(self, request: pb.SendRequest, context: Context) -> pb.SendReply:
        side = await self._side(request.node_id, context)
        try:
            await side.offers.send(
                request.node_id, request.offer_id, request.ticket_id, list(request.generations), request.deadline_s
            )
        except TransferError as error:
            await context.abort(grpc.StatusCode.ABORTED, str(error))
        return pb.SendReply()

    async def Fence(self, request: pb.FenceRequest, context: Context) -> pb.FenceReply:
        side = await self._side(request.node_id, context)
        return pb.FenceReply(sent_ordinals=await side.offers.fence(request.node_id, request.ticket_id))

    async def Watch(self, request: pb.WatchRequest, context: Context) -> AsyncIterator[pb.KvEvent]:
        """Waits for the first worker to attach: before it there is nothing to tell."""
        await self._check_life(request.incarnation or self._state.incarnation, context)
        opened = await self._state.wait_opened()
        subscription = None if opened is None else opened.store.events.subscribe(opened.store.held())
        if subscription is None:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the node is ending, or has too many subscribers")
        assert subscription is not None
        try:
            while (event := await subscription.next()) is not None:
                kind: Any = event.kind.value
                yield pb.KvEvent(sequence=event.sequence, kind=kind, tier=event.tier, keys=b"".join(event.keys))
        finally:
            subscription.end()

    async def _check_life(self, incarnation: int, context: Context) -> None:
        if incarnation != self._state.incarnation:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "this node has restarted since it was listed")

    async def _side(self, node_id: str, context: Context) -> PeerSide:
        if not 0 < len(node_id) <= _MAX_NODE_ID:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a node id has 1 to 64 characters")
        opened = self._state.opened
        if opened is None or opened.peers is None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "this node shares nothing (yet)")
        assert opened is not None
        assert opened.peers is not None
        return opened.peers
