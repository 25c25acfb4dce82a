"""The table of the arena: which block is in which slot, and who may write, read or evict it. Pure: no memory, no clock.

                begin(owner)               commit(checksum)                    evict: LRU, leaf first
          FREE ──────────────> WRITING ─────────────────────> COMMITTED ──────────────────────────────> FREE
           ^   generation+1     │   │                             ^
           │                    │   └─ abandon ─> FREE            └─ leases: not evicted while one is open
           │                    │ owner_lost: its session ended
           │  abandon, or       v
           └─ owner_gone ── QUARANTINED            owner_gone: its process has ended, so nobody writes any more

A slot that is being written belongs to another process. It becomes free by that process's word (`abandon`, `commit`) or
by proof that the process is gone; never by time. A lease is only read through, and the reader checks what it copied, so
a lease may end by time.

Keys come as prefix chains and every block knows its parent, so eviction keeps chains whole: only a block without
children here is a candidate, and of those the least recently touched goes first. A child therefore never outlives its
parent in this tier. A soft pin moves a block behind all unpinned ones, a hard pin keeps it until the pin expires.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from kvstore.keys import BlockKey
from kvstore.store.candidates import Candidates
from kvstore.store.host_block import HostBlock, Pin, SlotRef
from kvstore.store.host_ledger import HostLedger, LeaseEntry, count_slots


@dataclass(slots=True)
class _Lease:
    owner: str
    since_s: float
    deadline_s: float
    blocks: list[HostBlock]


class HostTier:
    """Not thread-safe: the node's loop owns it. Times are in seconds on one monotonic clock."""

    def __init__(self, num_slots: int, block_bytes: int, tenant_bytes: int = 0, first_generation: int = 0) -> None:
        """`tenant_bytes` is what one named tenant may hold; 0 is no limit.

        Generations grow from `first_generation`: a reference from another life of the node must mean nothing in this.
        """
        self.num_slots = num_slots
        self.block_bytes = block_bytes
        self.evictions = 0
        self._free = list(range(num_slots - 1, -1, -1))
        self._generation = [first_generation] * num_slots
        self._blocks: dict[BlockKey, HostBlock] = {}
        self._by_slot: dict[int, HostBlock] = {}
        self._children: dict[BlockKey, int] = {}  # also of parents that are not here (yet)
        self._candidates = Candidates(self._evictable, tenant_bytes // block_bytes if tenant_bytes else num_slots)
        self._leases: dict[int, _Lease] = {}
        self._last_lease = 0
        self._tick = 0
        self._pinned: set[BlockKey] = set()
        self._removed: list[BlockKey] = []

    # --- reading -----------------------------------------------------------------------------------------------------

    def get(self, key: BlockKey) -> HostBlock | None:
        """The committed block with this key."""
        block = self._blocks.get(key)
        return block if block is not None and block.committed else None

    def is_writing(self, key: BlockKey) -> bool:
        block = self._blocks.get(key)
        return block is not None and not block.committed

    def is_written(self, ref: SlotRef) -> bool:
        """Begun, and neither committed nor given back."""
        return self._written(ref) is not None

    def match(self, keys: Sequence[BlockKey]) -> int:
        """How many leading keys are committed here."""
        for count, block in enumerate(map(self._blocks.get, keys)):
            if block is None or not block.committed:
                return count
        return len(keys)

    def open_lease(self, owner: str, now_s: float, deadline_s: float) -> int:
        """A lease without blocks yet, which ends at `deadline_s` at the latest."""
        self._last_lease += 1
        self._tick += 1
        self._leases[self._last_lease] = _Lease(owner, now_s, deadline_s, [])
        return self._last_lease

    def lease(self, lease_id: int, keys: Sequence[BlockKey], *, touch: bool = True) -> list[HostBlock]:
        """Add the leading committed run of `keys` to the lease; nothing if the lease has ended.

        The node's own reading, which says nothing about what is in demand, does not `touch`.
        """
        lease = self._leases.get(lease_id)
        if lease is None:
            return []
        run: list[HostBlock] = []
        tick, touched = self._tick, int(touch)
        for block in map(self._blocks.get, keys):  # 2,000 of them, perhaps
            if block is None or not block.committed:
                break
            block.leases += 1
            block.touches += touched
            if touch:
                block.tick = tick
            run.append(block)
        lease.blocks += run
        return run

    def release(self, lease_id: int) -> None:
        """End a lease. Idempotent."""
        lease = self._leases.pop(lease_id, None)
        for block in () if lease is None else lease.blocks:
            block.leases -= 1
            if block.leases == 0:
                if self._blocks.get(block.key) is block:
                    self._candidates.add(block)
                else:
                    self._free_slot(block)  # dropped while it was read

    def expire(self, now_s: float) -> int:
        """End the leases and pins whose time has passed; returns how many leases."""
        overdue = [lease_id for lease_id, lease in self._leases.items() if lease.deadline_s <= now_s]
        for lease_id in overdue:
            self.release(lease_id)
        for key in [key for key in self._pinned if self._blocks[key].pin_expires_s <= now_s]:
            self.pin(key, Pin.NONE, now_s)
        return len(overdue)

    # --- writing -----------------------------------------------------------------------------------------------------

    def victim_for(self, tenant: str) -> HostBlock | None:
        """The block that `begin` would evict for this tenant now; None if a slot is free or nothing can go."""
        return self._candidates.next(tenant, any_free=bool(self._free))

    def begin(self, owner: str, key: BlockKey, parent: BlockKey | None, tenant: str = "") -> SlotRef | None:
        """A slot for `owner` to write, evicting if need be; None if the key is here, or there is no room."""
        if key in self._blocks or key == parent:
            return None
        victim = self.victim_for(tenant)
        if victim is not None and victim.key == parent:
            return None  # a chain that is longer than what may be held keeps its beginning
        if victim is not None:
            self.evict(victim.key)
        if not self._free or self._candidates.is_full(tenant):
            return None
        slot = self._free.pop()
        self._generation[slot] += 1
        self._tick += 1
        block = HostBlock(key, parent, tenant, SlotRef(slot, self._generation[slot]), owner, self._tick)
        block.children = self._children.get(key, 0)
        self._blocks[key] = self._by_slot[slot] = block
        if parent is not None:
            self._count_child(parent, +1)
        self._candidates.count(block, +1)
        return block.ref

    def commit(self, ref: SlotRef, checksum: int) -> HostBlock | None:
        """The writer is done: publish the block. None, and nothing is published, if the slot is not its any more."""
        block = self._written(ref)
        if block is None:
            return None
        if block.quarantined:  # its session was lost meanwhile; that it is done is all we can use
            self._remove(block)
            return None
        block.committed, block.owner, block.checksum = True, "", checksum
        if block.children == 0:
            self._candidates.add(block)
        return block

    def abandon(self, ref: SlotRef) -> bool:
        """The writer writes no more and has nothing to publish."""
        block = self._written(ref)
        if block is None:
            return False
        self._remove(block)
        return True

    def owner_lost(self, owner: str) -> int:
        """The owner's session ended, but it may still write: quarantine its slots, end its leases. Returns how many."""
        for lease_id in [lease_id for lease_id, lease in self._leases.items() if lease.owner == owner]:
            self.release(lease_id)
        lost = [block for block in self._by_slot.values() if block.owner == owner]
        for block in lost:
            block.quarantined = True
        return len(lost)

    def owner_gone(self, owner: str, still_writing: Collection[SlotRef] = ()) -> int:
        """Proven: the owner's process has ended, or by its own word writes only there. Frees the rest; how many."""
        gone = [block for block in self._by_slot.values() if block.owner == owner and block.ref not in still_writing]
        for block in gone:
            self._remove(block)
        return len(gone)

    # --- evicting and pinning ----------------------------------------------------------------------------------------

    def evict(self, key: BlockKey) -> bool:
        """Remove a block that nobody reads and nothing follows."""
        block = self._blocks.get(key)
        if block is None or not self._removable(block):
            return False
        self.evictions += 1
        self._remove(block)
        return True

    def evict_with_descendants(self, keys: Iterable[BlockKey]) -> list[BlockKey]:
        """Remove these blocks and all that follow them, except what is held and what leads to it."""
        following: dict[BlockKey, list[BlockKey]] = {}
        for block in self._blocks.values():
            if block.parent is not None:
                following.setdefault(block.parent, []).append(block.key)
        doomed = list(dict.fromkeys(keys))
        for key in doomed:  # grows while it is walked, parents before children
            doomed += following.pop(key, ())
        return [key for key in reversed(doomed) if self.evict(key)]

    def drop(self, key: BlockKey) -> bool:
        """Take back a block whose bytes are wrong, unless it is being read: then nobody else finds it from now on."""
        block = self._blocks.get(key)
        if block is None or not block.committed:
            return False
        self._unlink(block)
        if block.leases == 0:
            self._free_slot(block)
        else:
            block.quarantined = True
        return True

    def pin(self, key: BlockKey, pin: Pin, expires_s: float) -> bool:
        """Soft: evicted after all others. Hard: not evicted. Both until `expires_s`; NONE unpins."""
        block = self.get(key)
        if block is None:
            return False
        block.pin, block.pin_expires_s = pin, expires_s
        if pin is Pin.NONE:
            self._pinned.discard(key)
        else:
            self._pinned.add(key)
        if block.children == 0 and block.leases == 0:
            self._candidates.add(block)
        return True

    # --- looking at it -----------------------------------------------------------------------------------------------

    def blocks(self) -> Iterable[HostBlock]:
        """The committed ones."""
        return (block for block in self._blocks.values() if block.committed)

    def __len__(self) -> int:
        """Blocks of the tier, those that are being written included."""
        return len(self._blocks)

    def drain_removed(self) -> list[BlockKey]:
        """Keys that were visible and vanished since the last call, oldest first."""
        removed, self._removed = self._removed, []
        return removed

    def tenant_bytes(self) -> dict[str, int]:
        return {tenant: count * self.block_bytes for tenant, count in self._candidates.tenant_blocks.items()}

    def ledger(self, now_s: float) -> HostLedger:
        leases = (
            LeaseEntry(lease.owner, len(lease.blocks), now_s - lease.since_s, lease.deadline_s - now_s)
            for lease in self._leases.values()
        )
        return count_slots(self._free, self._by_slot.values(), self.num_slots, leases)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _written(self, ref: SlotRef) -> HostBlock | None:
        block = self._by_slot.get(ref.slot)
        return block if block is not None and block.ref == ref and not block.committed else None

    def _removable(self, block: HostBlock) -> bool:
        return block.committed and block.leases == 0 and block.children == 0 and block.pin is not Pin.HARD

    def _evictable(self, block: HostBlock) -> bool:
        return self._blocks.get(block.key) is block and self._removable(block)

    def _count_child(self, parent: BlockKey, change: int) -> None:
        count = self._children.get(parent, 0) + change
        if count:
            self._children[parent] = count
        else:
            self._children.pop(parent, None)
        block = self._blocks.get(parent)
        if block is not None:
            block.children = count
            if count == 0:
                self._candidates.add(block)

    def _remove(self, block: HostBlock) -> None:
        self._unlink(block)
        self._free_slot(block)

    def _unlink(self, block: HostBlock) -> None:
        """Nobody finds it any more."""
        del self._blocks[block.key]
        if block.committed:
            self._removed.append(block.key)
        self._pinned.discard(block.key)
        if block.parent is not None:
            self._count_child(block.parent, -1)
        self._candidates.count(block, -1)

    def _free_slot(self, block: HostBlock) -> None:
        del self._by_slot[block.ref.slot]
        self._free.append(block.ref.slot)
