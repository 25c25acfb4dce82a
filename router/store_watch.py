"""The store nodes that workers are attached to: one subscription to each, dialled again while a worker names the node.

    worker: StoreReport(address, life) ──> Watch ──> snapshot, then changes ──> StoreIndex
                                             └─ stream ends, gap, another life: forgotten, and subscribed again

A node that cannot be reached is as good as none: what its blocks would save is computed, as ever.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass

import grpc

from kvstore.control_plane import IN_THE_CLEAR, KEEPALIVE, ControlPlane
from kvstore.errors import Unavailable
from kvstore.store import store_pb2 as pb
from kvstore.store.store_pb2_grpc import StorePeerStub
from kvstore.store.tier import Tier
from kvstore.store.wire import split_keys
from router.limits import LinkLimits
from router.store_index import MAX_NODES, StoreIndex

log = logging.getLogger(__name__)

_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),
    *KEEPALIVE,
)


@dataclass(frozen=True, slots=True)
class StoreLife:
    """One life of a node."""

    address: str
    incarnation: int


class StoreWatch:
    """All methods run in the event loop."""

    def __init__(self, limits: LinkLimits, control: ControlPlane = IN_THE_CLEAR) -> None:
        self.index = StoreIndex()
        self.resyncs = 0  # subscriptions that ended
        self._limits = limits
        self._control = control
        self._watched: dict[StoreLife, tuple[int, asyncio.Task[None]]] = {}

    def watch(self, lives: Iterable[StoreLife]) -> None:
        """Follow exactly these; of more than MAX_NODES the rest is left out."""
        wanted = set(lives)
        for life in [each for each in self._watched if each not in wanted]:
            node, task = self._watched.pop(life)
            task.cancel()
            self.index.leave(node)
        for life in sorted(wanted - self._watched.keys(), key=lambda each: each.address):
            used = {node for node, _ in self._watched.values()}
            free = next((node for node in range(MAX_NODES) if node not in used), None)
            if free is None:
                log.warning("store=%s not followed: %d nodes are", life.address, MAX_NODES)
                return
            task = asyncio.create_task(self._follow(life, free), name=f"store {life.address}")
            self._watched[life] = free, task

    def node(self, life: StoreLife | None) -> int:
        """The node's number in the index; -1 for none."""
        return self._watched[life][0] if life in self._watched else -1

    async def close(self) -> None:
        tasks = [task for _, task in self._watched.values()]
        self.watch(())
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(self, life: StoreLife, node: int) -> None:
        backoff_s = self._limits.backoff_min_s
        told = ""
        while True:
            self.index.join(node)
            try:
                complete = await self._subscription(life, node)
                reason = "it ended the subscription"
            except grpc.aio.AioRpcError as error:
                complete, reason = False, error.details() or error.code().name
            except ValueError as error:
                complete, reason = True, str(error)
            except Unavailable as error:
                complete, reason = False, str(error)
            self.index.leave(node)
            self.resyncs += 1
            if reason != told:
                log.warning("store=%s not followed: %s", life.address, reason)
                told = reason
            backoff_s = self._limits.backoff_min_s if complete else min(2 * backoff_s, self._limits.backoff_max_s)
            await asyncio.sleep(backoff_s)

    async def _subscription(self, life: StoreLife, node: int) -> bool:
        """From its snapshot to its end; whether the snapshot was complete.

        Raises:
            AioRpcError: the node is not reached, or is another life.
            Unavailable: there are no certificates to reach it with.
            ValueError: an event is missing or malformed.
        """
        complete = False
        async with self._control.channel(life.address, _OPTIONS) as channel:
            async for event in StorePeerStub(channel).Watch(pb.WatchRequest(incarnation=life.incarnation)):
                self._apply(node, event)
                if event.kind == pb.KvEvent.SNAPSHOT_END:
                    complete = True
                    log.info("store=%s followed: %d blocks are known of all nodes", life.address, len(self.index))
        return complete

    def _apply(self, node: int, event: pb.KvEvent) -> None:
        """Raises ValueError for what no correct node sends."""
        if event.kind == pb.KvEvent.SNAPSHOT_END:
            self.index.snapshot_ended(node, event.sequence)
            return
        tier = Tier(event.tier)
        match event.kind:
            case pb.KvEvent.STORED:
                self.index.stored(node, event.sequence, tier, split_keys(event.keys))
            case pb.KvEvent.REMOVED:
                self.index.removed(node, event.sequence, tier, split_keys(event.keys))
            case pb.KvEvent.CLEARED:
                self.index.cleared(node, event.sequence, tier)
            case other:
                raise ValueError(f"a KV event of kind {other} is unknown")
