"""The node's state: closed until the first worker says what a block is, then open with arena, disk and remote tier."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.background import keep_running
from kvstore.errors import Unavailable
from kvstore.host import host_id
from kvstore.store.arena import Arena
from kvstore.store.config import StoreConfig
from kvstore.store.disk_tier import DiskTier, check_disk
from kvstore.store.geometry import Geometry
from kvstore.store.host_tier import HostTier
from kvstore.store.locations import Locations, NodeRecord, connect
from kvstore.store.metrics import StoreMetrics
from kvstore.store.offers import Offers
from kvstore.store.peer_links import PeerLinks
from kvstore.store.remote import Remote
from kvstore.store.sessions import SessionTable
from kvstore.store.store import TieredStore
from kvstore.transfer.transport import Buffer
from kvstore.transfer.ucx import UcxTransport

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PeerSide:
    """What a node with an index has towards other nodes."""

    locations: Locations
    links: PeerLinks
    offers: Offers


@dataclass(slots=True)
class OpenStore:
    """A node that knows its geometry."""

    geometry: Geometry
    arena: Arena | None
    store: TieredStore
    sessions: SessionTable
    peers: PeerSide | None
    tasks: list[asyncio.Task[None]]

    @property
    def arena_path(self) -> str:
        """Empty without a host tier."""
        return "" if self.arena is None else str(self.arena.path)


class NodeState:
    """Use on the node's loop. `problems` are sentences about tiers that could not be had."""

    def __init__(self, config: StoreConfig) -> None:
        self.config = config
        self.incarnation = secrets.randbits(63) | 1
        self.metrics = StoreMetrics()
        self.opened: OpenStore | None = None
        self.ending = asyncio.Event()
        self.address = ""  # host:port for other nodes; set before the node opens
        self.problems: list[str] = []
        self._opening: asyncio.Task[OpenStore] | None = None
        self._opened = asyncio.Event()

    def check(self) -> None:
        """Before a worker is there: what its blocks could not be put in is told now. Raises Unavailable."""
        config = self.config
        if config.disk_bytes and config.disk_path is not None:
            check_disk(config.disk_path, config.disk_bytes)
        if config.redis_url is not None:
            connect(config.redis_url)

    async def open(self, geometry: Geometry) -> OpenStore:
        """Open for blocks like these, or find it open.

        Raises:
            Unavailable: the node serves others.
        """
        if self._opening is None:
            self._opening = asyncio.create_task(self._open(geometry), name="open store")
        # A worker that hangs up meanwhile must not leave a half-open node behind.
        opened = await asyncio.shield(self._opening)
        if opened.geometry != geometry:
            ours = opened.geometry.block_bytes
            raise Unavailable(
                f"store node {self.config.node_id} holds blocks of another model, dtype or layout ({ours} bytes each,"
                f" not {geometry.block_bytes}): start a node for each, or restart this one"
            )
        return opened

    async def wait_opened(self) -> OpenStore | None:
        """None if the node ends first."""
        waiting = [asyncio.ensure_future(event.wait()) for event in (self._opened, self.ending)]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in waiting:
                one.cancel()
        return self.opened

    async def _open(self, geometry: Geometry) -> OpenStore:
        config, loop = self.config, asyncio.get_running_loop()
        arena = await loop.run_in_executor(None, self._open_arena, geometry)
        slots: Sequence[Buffer] = () if arena is None else arena.slots
        disk = None if arena is None else await loop.run_in_executor(None, self._open_disk, geometry)
        first = self.incarnation >> 32 << 32  # of this life's generations and sessions
        host = HostTier(len(slots), geometry.block_bytes, config.tenant_bytes, first)
        directory = None if arena is None else arena.directory
        store = TieredStore(host, slots, disk, config.policy, config.limits, self.metrics, directory)
        peers = await self._open_peers(geometry, store)
        opened = OpenStore(geometry, arena, store, SessionTable(host, first), peers, [])
        opened.tasks.append(keep_running(lambda: _sweep(store), "store sweep"))
        if store.write_behind is not None:
            opened.tasks.append(keep_running(store.write_behind.run, "write-behind"))
        if peers is not None:
            opened.tasks.append(keep_running(lambda: peers.locations.run(store.held), "index"))
        log.info(
            "open for blocks of %d bytes: %d slots, %d blocks on disk",
            geometry.block_bytes,
            host.num_slots,
            0 if disk is None else len(disk),
        )
        self.opened = opened
        self._opened.set()
        return opened

    def _open_arena(self, geometry: Geometry) -> Arena | None:
        config = self.config
        if not config.host_bytes:
            return None
        try:
            return Arena(config.node_id, config.host_bytes, geometry.block_bytes)
        except Unavailable as error:
            self._note(f"no host tier: {error}")
            return None

    def _open_disk(self, geometry: Geometry) -> DiskTier | None:
        config = self.config
        if not config.disk_bytes or config.disk_path is None:
            return None
        try:
            return DiskTier(
                config.disk_path,
                config.disk_bytes,
                geometry.block_bytes,
                geometry.fingerprint,
                self.incarnation,
                tenant_bytes=config.tenant_bytes,
            )
        except Unavailable as error:
            self._note(f"no disk tier: {error}")
            return None

    async def _open_peers(self, geometry: Geometry, store: TieredStore) -> PeerSide | None:
        config = self.config
        if config.redis_url is None or not store.slots:
            return None
        me = NodeRecord(self.incarnation, config.node_id, self.address, host_id())
        limits = config.limits
        try:
            transport = await asyncio.get_running_loop().run_in_executor(None, UcxTransport)
            locations = Locations(
                config.redis_url, config.namespace, me, ttl_s=limits.location_ttl_s, timeout_s=limits.index_timeout_s
            )
        except Unavailable as error:
            self._note(f"no remote tier: {error}")
            return None
        links = PeerLinks(me, geometry, transport, limits.peer_dial_s, config.control)
        store.remote = Remote(store, locations, links, config.node_id)
        return PeerSide(locations, links, Offers(store, links))

    def _note(self, problem: str) -> None:
        log.warning(problem)
        self.problems.append(problem)

    async def close(self) -> None:
        """End sessions, save to disk what the host tier alone has, as far as time allows, and let go. Idempotent."""
        self.ending.set()
        if self._opening is not None:
            await asyncio.gather(self._opening, return_exceptions=True)  # what it took is given back below
        opened, self.opened = self.opened, None
        if opened is None:
            return
        opened.store.events.close()
        opened.sessions.close()
        if opened.arena is not None:
            opened.arena.close()  # the file goes first, whatever happens later; we keep what we have mapped
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.limits.close_s):
                await opened.store.demote()
                await opened.store.settle()
        for task in opened.tasks:
            task.cancel()
        await asyncio.gather(*opened.tasks, return_exceptions=True)
        if opened.peers is not None:
            await opened.peers.locations.close()
            await opened.peers.offers.shut_down()
            await opened.peers.links.shut_down()
        loop = asyncio.get_running_loop()
        if opened.store.disk is not None:
            await loop.run_in_executor(None, opened.store.disk.close)


async def _sweep(store: TieredStore) -> None:
    while True:
        await asyncio.sleep(store.limits.sweep_s)
        store.sweep()
