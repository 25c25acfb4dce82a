"""The tiers of one node as one store: look up, load (which promotes), save (which writes behind), verify.

    load:   host ── miss ──> disk ── miss ──> remote          each brings a run of blocks into host slots, verified
    save:   begin ── the worker writes the slot ── commit ──> host ── by policy ──> disk

Only bytes with the checksum that their writer gave them are ever committed, and a reader checks what it copied.
Whatever is broken, late or full makes a miss.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.keys import BlockKey
from kvstore.store.config import SavePolicy, StoreLimits
from kvstore.store.directory import DirectoryWriter
from kvstore.store.disk_tier import DiskTier
from kvstore.store.events import EventKind, EventLog
from kvstore.store.host_block import HostBlock, Pin, SlotRef
from kvstore.store.host_tier import HostTier
from kvstore.store.landing import RemoteTier
from kvstore.store.loads import Loaded, Loading
from kvstore.store.metrics import StoreMetrics
from kvstore.store.promotion import Promotion
from kvstore.store.scrub import drop_corrupt
from kvstore.store.tier import Tier
from kvstore.store.write_behind import WriteBehind
from kvstore.transfer.transport import Buffer


@dataclass(frozen=True, slots=True)
class Verified:
    num_blocks: int
    num_corrupt: int


class TieredStore:
    """Use on one asyncio loop. `slots` is the arena's memory, uint8 `[block_bytes]` each."""

    def __init__(
        self,
        host: HostTier,
        slots: Sequence[Buffer],
        disk: DiskTier | None = None,
        policy: SavePolicy = SavePolicy.SECOND_TOUCH,
        limits: StoreLimits | None = None,
        metrics: StoreMetrics | None = None,
        directory: DirectoryWriter | None = None,
    ) -> None:
        self.host = host
        self.slots = slots
        self.disk = disk
        self.remote: RemoteTier | None = None
        self.events = EventLog()
        self.metrics = metrics or StoreMetrics()
        self.limits = limits or StoreLimits()
        self._directory = directory
        self._policy = policy
        self._promotion = None if disk is None else Promotion(self, disk)
        self._begun_s: dict[SlotRef, float] = {}
        self.write_behind: WriteBehind | None = None
        if disk is not None and policy is not SavePolicy.NONE:
            limit = self.limits
            self.write_behind = WriteBehind(
                host, slots, disk, self.metrics, limit.write_behind_bytes, limit.disk_batch_bytes
            )

    # --- reading -----------------------------------------------------------------------------------------------------

    def lookup_here(self, keys: Sequence[BlockKey]) -> bytes:
        """The tier of each block of the longest leading run held by this node."""
        host, disk = self.host, self.disk
        count = host.match(keys)
        tiers = bytearray(bytes([Tier.HOST]) * count)
        if disk is not None:
            for key in keys[count:]:
                if host.get(key) is not None:
                    tiers.append(Tier.HOST)
                elif key in disk:
                    tiers.append(Tier.DISK)
                else:
                    break
        return bytes(tiers)

    async def lookup(self, keys: Sequence[BlockKey]) -> bytes:
        """The tier of each block of the longest leading run held anywhere."""
        tiers = self.lookup_here(keys)
        if len(tiers) < len(keys) and self.remote is not None:
            tiers += bytes([Tier.REMOTE]) * await self.remote.locate(keys[len(tiers) :])
        return tiers

    async def load(self, owner: str, keys: Sequence[BlockKey], deadline_s: float, *, from_peers: bool = True) -> Loaded:
        """Lease the leading run of `keys` in the host tier; takes `deadline_s` seconds at most."""
        loading = self.begin_load(owner, keys, deadline_s)
        if self.has_more(loading):
            await self.bring_rest(loading, from_peers=from_peers)
        return self.end_load(loading)

    def begin_load(self, owner: str, keys: Sequence[BlockKey], deadline_s: float) -> Loading:
        """Lease what is in the host tier now; `end_load` is due."""
        now_s = time.monotonic()
        until_s = now_s + min(max(deadline_s, 0.0), self.limits.max_load_s)
        lease_id = self.host.open_lease(owner, now_s, until_s + self.limits.lease_s)
        return Loading(lease_id, keys, until_s, self.host.lease(lease_id, keys))

    def has_more(self, loading: Loading) -> bool:
        """Whether another tier may have what comes next."""
        count = len(loading.blocks)
        if count == len(loading.keys):
            return False
        first = loading.keys[count]
        return self.remote is not None or (self._promotion is not None and self._promotion.has(first))

    async def bring_rest(self, loading: Loading, *, from_peers: bool = True) -> None:
        """Lease what other tiers give, until the deadline. A caller that is cancelled has nothing leased."""
        keys, blocks = loading.keys, loading.blocks
        try:
            while len(blocks) < len(keys) and time.monotonic() < loading.until_s:
                rest = keys[len(blocks) :]
                missing = {key for key in rest if self.host.get(key) is None}
                parent = keys[len(blocks) - 1] if blocks else None
                tier = await self._bring(rest, parent, loading.until_s, from_peers=from_peers)
                run = self.host.lease(loading.lease_id, rest)
                if not run:
                    return
                loading.brought.update((block.key, tier) for block in run if block.key in missing)
                blocks += run
        except TimeoutError:
            pass  # what is there by now
        except asyncio.CancelledError:
            self.host.release(loading.lease_id)
            raise

    def end_load(self, loading: Loading) -> Loaded:
        """What came of it."""
        blocks, brought = loading.blocks, loading.brought
        self._note_load(blocks, len(loading.keys), brought)
        if not blocks:
            self.host.release(loading.lease_id)
            return Loaded(0, [], b"")
        tiers = bytes([Tier.HOST]) * len(blocks)
        if brought:
            tiers = bytes(brought.get(block.key, Tier.HOST) for block in blocks)
        return Loaded(loading.lease_id, blocks, tiers)

    def release(self, lease_id: int) -> None:
        self.host.release(lease_id)

    async def report_corrupt(self, keys: Sequence[BlockKey]) -> int:
        """A reader's copies had other checksums: drop the blocks whose bytes are wrong here too; how many."""
        return await self._drop_corrupt([block for key in keys if (block := self.host.get(key))])

    # --- writing -----------------------------------------------------------------------------------------------------

    def begin_save(
        self, owner: str, entries: Sequence[tuple[BlockKey, BlockKey | None]], tenant: str = ""
    ) -> list[SlotRef | None]:
        """A slot to write for each block that is not here and fits."""
        refs = [self._begin(owner, key, parent, tenant) for key, parent in entries]
        now_s = time.monotonic()
        self._begun_s.update((ref, now_s) for ref in refs if ref is not None)
        self.publish_removed()
        return refs

    def commit_save(self, saved: Sequence[tuple[SlotRef, int]]) -> int:
        """Publish what was written, with its checksums, parents first; how many blocks are new."""
        stored = [block for ref, checksum in saved if (block := self.host.commit(ref, checksum)) is not None]
        began_s = [self._begun_s.pop(ref) for ref, _ in saved if ref in self._begun_s]
        if stored:
            now_s = time.monotonic()
            num_bytes = len(stored) * self.host.block_bytes
            self.metrics.saved(Tier.HOST, num_bytes, now_s - min(began_s, default=now_s))
            self._stored(stored)
        return len(stored)

    def abandon_save(self, refs: Sequence[SlotRef]) -> None:
        for ref in refs:
            self._begun_s.pop(ref, None)
            self.host.abandon(ref)

    # --- operators ---------------------------------------------------------------------------------------------------

    def evict(self, keys: Sequence[BlockKey], tier: Tier | None) -> int:
        """These blocks and what follows them, where nobody holds them; how many went."""
        count = 0
        if tier in (None, Tier.HOST):
            count += len(self.host.evict_with_descendants(keys))
        if tier in (None, Tier.DISK) and self.disk is not None:
            count += self.disk.drop(keys)
        self.publish_removed()
        return count

    def pin(self, keys: Sequence[BlockKey], pin: Pin, expires_s: float) -> int:
        """Pin in the host tier for so many seconds from now; how many blocks are here to be pinned."""
        until_s = time.monotonic() + expires_s
        return sum(self.host.pin(key, pin if expires_s > 0 else Pin.NONE, until_s) for key in keys)

    async def verify(self) -> Verified:
        """Read everything and drop what has not its checksum."""
        blocks = list(self.host.blocks())
        num_corrupt = await self._drop_corrupt(blocks)
        if self.disk is None:
            return Verified(len(blocks), num_corrupt)
        on_disk, corrupt_on_disk = await self.disk.verify()
        self.publish_removed()
        return Verified(len(blocks) + on_disk, num_corrupt + corrupt_on_disk)

    async def _drop_corrupt(self, blocks: Sequence[HostBlock]) -> int:
        count = await drop_corrupt(self.host, self.slots, blocks)
        self.metrics.corrupt(Tier.HOST, count)
        self.publish_removed()
        return count

    def sweep(self) -> None:
        """End what has expired; to be called now and then."""
        self.host.expire(time.monotonic())
        self._begun_s = {ref: began_s for ref, began_s in self._begun_s.items() if self.host.is_written(ref)}
        self.publish_removed()

    def held(self) -> dict[Tier, Sequence[BlockKey]]:
        """Everything that a look-up finds here, by tier."""
        host = [block.key for block in self.host.blocks()]
        return {Tier.HOST: host} if self.disk is None else {Tier.HOST: host, Tier.DISK: self.disk.keys()}

    def publish_removed(self) -> None:
        """Tell subscribers what has gone since the last time."""
        if removed := self.host.drain_removed():
            if self._directory is not None:
                self._directory.remove(removed)
            self._tell_removed(Tier.HOST, removed, left=any(True for _ in self.host.blocks()))
        if self.disk is not None:
            if stored := self.disk.drain_stored():
                self.events.emit(EventKind.STORED, Tier.DISK, stored)
                if self.remote is not None:
                    self.remote.announce(Tier.DISK, stored)
            if removed := self.disk.drain_removed():
                self._tell_removed(Tier.DISK, removed, left=len(self.disk) > 0)

    def _tell_removed(self, tier: Tier, keys: Sequence[BlockKey], *, left: bool) -> None:
        """A tier in which nothing is left needs no list."""
        self.events.emit(EventKind.REMOVED if left else EventKind.CLEARED, tier, keys if left else ())

    async def demote(self) -> None:
        """Write to disk what the host tier alone has, the latest used first, for the next life. May be cancelled."""
        if self.write_behind is None:
            return
        for block in sorted(self.host.blocks(), key=lambda block: block.tick, reverse=True):
            if not self.write_behind.add_chain(block):
                await self.write_behind.flush()
                self.write_behind.add_chain(block)

    async def settle(self) -> None:
        """Wait for what goes on in the background."""
        if self._promotion is not None:
            await self._promotion.settle()
        if self.write_behind is not None:
            await self.write_behind.flush()
        self.publish_removed()

    # --- inside ------------------------------------------------------------------------------------------------------

    def begin_fetch(self, owner: str, key: BlockKey, parent: BlockKey | None, tenant: str) -> SlotRef | None:
        """A slot for a block of another tier."""
        return self._begin(owner, key, parent, tenant)

    def commit_fetched(self, tier: Tier, landed: Sequence[tuple[SlotRef, int]]) -> int:
        """Publish blocks whose bytes were verified as they came in from `tier`."""
        stored = [block for ref, checksum in landed if (block := self.host.commit(ref, checksum)) is not None]
        if stored:
            self._list(stored)
            self.events.emit(EventKind.STORED, Tier.HOST, (block.key for block in stored))
            if self.remote is not None and tier is Tier.REMOTE:
                self.remote.announce(Tier.HOST, [block.key for block in stored])
        return len(stored)

    def _begin(self, owner: str, key: BlockKey, parent: BlockKey | None, tenant: str) -> SlotRef | None:
        victim = self.host.victim_for(tenant)
        if victim is not None and self.write_behind is not None and self._wanted_on_disk(victim):
            self.write_behind.rescue(victim)
        evictions = self.host.evictions
        ref = self.host.begin(owner, key, parent, tenant)
        if self.host.evictions != evictions:
            self.metrics.evicted(Tier.HOST, self.host.evictions - evictions)
        return ref

    def _wanted_on_disk(self, block: HostBlock) -> bool:
        return self._policy is SavePolicy.ALL or (self._policy is SavePolicy.SECOND_TOUCH and block.touches >= 2)

    def _stored(self, blocks: Sequence[HostBlock]) -> None:
        self._list(blocks)
        keys = [block.key for block in blocks]
        self.events.emit(EventKind.STORED, Tier.HOST, keys)
        if self.remote is not None:
            self.remote.announce(Tier.HOST, keys)
        if self.write_behind is not None and self._policy is SavePolicy.ALL:
            self.write_behind.add(blocks)

    def _list(self, blocks: Sequence[HostBlock]) -> None:
        """For workers to find without asking."""
        if self._directory is not None:
            for block in blocks:
                self._directory.put(block.key, block.ref.slot, block.checksum)

    def _note_load(self, blocks: Sequence[HostBlock], num_wanted: int, brought: dict[BlockKey, Tier]) -> None:
        counts = [0, 0, 0, 0]
        for tier in brought.values():
            counts[tier] += 1
        counts[Tier.HOST] = len(blocks) - len(brought)
        for tier in Tier:
            if counts[tier]:
                self.metrics.hit(tier, counts[tier])
        if len(blocks) < num_wanted:
            self.metrics.missed(num_wanted - len(blocks))
        if self.disk is not None:
            self.disk.touch([block.key for block in blocks])
            if self.write_behind is not None:
                wants = self.write_behind.wants
                self.write_behind.add([block for block in blocks if wants(block.key) and self._wanted_on_disk(block)])

    async def _bring(
        self, keys: Sequence[BlockKey], parent: BlockKey | None, until_s: float, *, from_peers: bool
    ) -> Tier:
        """Try to have the first of `keys`, and more, in the host tier; from where. Raises TimeoutError at `until_s`."""
        first = keys[0]
        if self._promotion is not None and self._promotion.has(first):
            await self._promotion.bring(keys, until_s)
            return Tier.DISK
        if from_peers and self.remote is not None and not self.host.is_writing(first):
            await self.remote.fetch(keys, parent, until_s)
        return Tier.REMOTE
