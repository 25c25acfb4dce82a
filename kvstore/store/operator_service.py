"""The gRPC edge of a node towards operators: what it holds, and a few things that may be done to it."""

from __future__ import annotations

import time
from collections.abc import Iterator

from kvstore.keys import BlockKey
from kvstore.store import store_pb2 as pb
from kvstore.store.admin import update_gauges
from kvstore.store.breaker import BreakerState
from kvstore.store.edge import Context, keys_of, opened_store
from kvstore.store.host_block import Pin
from kvstore.store.opened import NodeState, OpenStore
from kvstore.store.store_pb2_grpc import StoreOperatorServicer
from kvstore.store.tier import Tier

MAX_LISTED = 1 << 16


class OperatorService(StoreOperatorServicer):
    def __init__(self, state: NodeState) -> None:
        self._state = state

    async def Stat(self, request: pb.StatRequest, context: Context) -> pb.StatReply:
        """Of a node that no worker has attached to, only who it is."""
        state = self._state
        reply = pb.StatReply(node_id=state.config.node_id, incarnation=state.incarnation, address=state.address)
        reply.problems.extend(state.problems)
        opened = state.opened
        if opened is None:
            return reply
        update_gauges(state)
        reply.fingerprint, reply.block_bytes = opened.geometry.fingerprint, opened.geometry.block_bytes
        reply.tiers.extend(self._tier(opened, tier) for tier in Tier)
        ledger = opened.store.host.ledger(time.monotonic())
        for name in ("free", "cached", "leased", "writing", "quarantined"):
            reply.slots[name] = getattr(ledger, name)
        reply.misses = int(state.metrics.value("pdserve_store_missed_blocks_total"))
        if opened.store.write_behind is not None:
            reply.write_behind_bytes = opened.store.write_behind.backlog_bytes
        reply.tenant_bytes.update(opened.store.host.tenant_bytes())
        return reply

    def _tier(self, opened: OpenStore, tier: Tier) -> pb.TierStat:
        def value(name: str) -> int:
            return int(self._state.metrics.value(f"pdserve_store_{name}", tier=tier.label))

        breaker = BreakerState.CLOSED
        if tier is Tier.DISK and opened.store.disk is not None:
            breaker = opened.store.disk.breaker
        elif tier is Tier.REMOTE and opened.peers is not None:
            breaker = opened.peers.locations.breaker
        return pb.TierStat(
            tier=tier.label,
            blocks=value("blocks"),
            bytes=value("bytes"),
            capacity_bytes=value("capacity_bytes"),
            hits=value("hit_blocks_total"),
            evictions=value("evicted_blocks_total"),
            corrupt=value("corrupt_blocks_total"),
            breaker=breaker.value,
        )

    async def List(self, request: pb.ListRequest, context: Context) -> pb.ListReply:
        opened = await opened_store(self._state, context)
        limit = min(request.limit or MAX_LISTED, MAX_LISTED)
        return pb.ListReply(blocks=[info for info, _ in zip(_blocks(opened), range(limit), strict=False)])

    async def Evict(self, request: pb.EvictRequest, context: Context) -> pb.EvictReply:
        store = (await opened_store(self._state, context)).store
        tier = Tier(request.tier) if request.tier in (Tier.HOST, Tier.DISK) else None
        keys = await keys_of(request.keys, context)
        if request.all:
            keys = [key for held in store.held().values() for key in held]
        return pb.EvictReply(evicted=store.evict(keys, tier))

    async def Pin(self, request: pb.PinRequest, context: Context) -> pb.PinReply:
        store = (await opened_store(self._state, context)).store
        pin = Pin.HARD if request.hard else Pin.SOFT
        return pb.PinReply(pinned=store.pin(await keys_of(request.keys, context), pin, request.expires_s))

    async def Verify(self, request: pb.VerifyRequest, context: Context) -> pb.VerifyReply:
        found = await (await opened_store(self._state, context)).store.verify()
        return pb.VerifyReply(verified=found.num_blocks, corrupt=found.num_corrupt)


def _blocks(opened: OpenStore) -> Iterator[pb.BlockInfo]:
    """Those of the host tier, then those of the disk."""
    for block in opened.store.host.blocks():
        yield pb.BlockInfo(
            key=block.key,
            parent=block.parent or b"",
            tier=Tier.HOST,
            leases=block.leases,
            tenant=block.tenant,
            pin=block.pin.value,
        )
    disk = opened.store.disk
    for key in [] if disk is None else disk.keys():
        assert disk is not None
        parent: BlockKey | None = disk.parent(key)
        yield pb.BlockInfo(key=key, parent=parent or b"", tier=Tier.DISK, tenant=disk.tenant(key))
