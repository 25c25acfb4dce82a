"""The block pool of one worker: who owns each block, and what may be read. Pure: no tensors, no clock, no threads.

                     allocate                   commit(key)                release, nobody left
              FREE ────────────> ALLOCATED ────────────────> COMMITTED ──────────────────────────> COMMITTED, cached
               ^  generation+1    │   ^  │                       ^            acquire(keys)              │
               │                  │   │  └─ release ─> FREE      └─────────────────────────────────────── │
               │          receive │   │ land (verified)                                                  │ evict (LRU)
               │                  v   │                                                                  v
               │               RECEIVING                                                                FREE
               │  drained         │ release: an abort or a lost peer
               └─────────── QUARANTINED

`allocate` raises the generation, so a reference to an earlier life of the block is stale and refused (invariant I2).
Only COMMITTED blocks with a key are found by `match` (I7). QUARANTINED leaves by `drained` alone, which the transfer
plane calls when its own posted receive has completed or the link is proven closed: never by time.

Every reference is counted under an owner. `release(owner)` is the one exit: idempotent, right for each state. Cached
blocks are evicted least recently released first, and a sequence releases its tail first, so a child never outlives its
parent; of a block computed twice, `commit` leaves one, which all owners hold.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from kvstore.errors import NoRoom, StaleBlock
from kvstore.keys import BlockKey


class BlockState(Enum):
    FREE = "free"
    ALLOCATED = "allocated"
    RECEIVING = "receiving"
    COMMITTED = "committed"
    QUARANTINED = "quarantined"


@dataclass(frozen=True, slots=True)
class BlockRef:
    """A block in one of its lives."""

    block_id: int
    generation: int


class HoldKind(Enum):
    COMPUTE = "compute"  # a sequence of this worker
    SEND = "send"  # a computed sequence whose blocks are being pushed to another worker
    RECEIVE = "receive"  # a sequence whose blocks are still landing
    LOAD = "load"  # blocks that are being filled from the store, and the prefix that they continue
    SAVE = "save"  # blocks that are being copied to the store


@dataclass(slots=True)
class Hold:
    """What one owner holds. A hold that another process can end early has a finite deadline."""

    kind: HoldKind
    since_s: float
    deadline_s: float | None
    blocks: list[BlockRef]


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    owner: str
    kind: str
    num_blocks: int
    age_s: float
    expires_in_s: float | None


@dataclass(frozen=True, slots=True)
class Ledger:
    """Every block once. `free + cached + held + sending + receiving + quarantined == total` (invariant I1)."""

    total: int
    free: int
    cached: int
    held: int
    sending: int
    receiving: int
    quarantined: int
    holds: tuple[LedgerEntry, ...]

    @property
    def sums(self) -> bool:
        parts = (self.free, self.cached, self.held, self.sending, self.receiving, self.quarantined)
        return sum(parts) == self.total

    @property
    def overdue(self) -> list[str]:
        """Owners whose deadline has passed: whoever watches it has not given the blocks back yet."""
        return [hold.owner for hold in self.holds if hold.expires_in_s is not None and hold.expires_in_s <= 0]

    @property
    def idle(self) -> bool:
        """Only free and cached blocks are left."""
        return self.sums and self.free + self.cached == self.total


@dataclass(frozen=True, slots=True)
class PoolEvents:
    """Keys that became visible or vanished since the last drain, in no order; a key is in one of the two."""

    stored: tuple[BlockKey, ...]
    removed: tuple[BlockKey, ...]


class BlockPool:
    """Not thread-safe: one thread owns it. `block_size` is in tokens."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks <= 0 or block_size <= 0:
            raise ValueError(f"a pool needs blocks and a block size, got {num_blocks} and {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._state = [BlockState.FREE] * num_blocks
        self._generation = [0] * num_blocks
        self._ref_count = [0] * num_blocks
        self._key: list[BlockKey | None] = [None] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # committed, nobody left; oldest first
        self._by_key: dict[BlockKey, int] = {}
        self._holds: dict[str, Hold] = {}
        self._changed: dict[BlockKey, bool] = {}  # key -> was it visible at the last drain

    # --- holds -------------------------------------------------------------------------------------------------------

    def open(self, owner: str, kind: HoldKind, now_s: float, deadline_s: float | None = None) -> None:
        """Start holding as `owner`; an owner holds once."""
        assert owner not in self._holds, f"{owner} holds already"
        assert kind is HoldKind.COMPUTE or deadline_s is not None, "a hold that crosses a process needs a deadline"
        self._holds[owner] = Hold(kind, now_s, deadline_s, [])

    def holds(self, owner: str) -> bool:
        return owner in self._holds

    def keep(self, owner: str) -> None:
        """A RECEIVE hold whose blocks have all landed becomes the sequence's own; its deadline ends."""
        hold = self._holds[owner]
        hold.kind, hold.deadline_s = HoldKind.COMPUTE, None

    def lend(self, owner: str, deadline_s: float) -> None:
        """A sequence is computed; from now on its blocks are held only for being pushed to another worker."""
        hold = self._holds[owner]
        hold.kind, hold.deadline_s = HoldKind.SEND, deadline_s

    def release(self, owner: str) -> list[BlockRef]:
        """Give back all that `owner` holds; nothing if it holds nothing. Returns the blocks now in quarantine."""
        hold = self._holds.pop(owner, None)
        if hold is None:
            return []
        quarantined: list[BlockRef] = []
        for ref in reversed(hold.blocks):
            block = ref.block_id
            self._ref_count[block] -= 1
            if self._state[block] is BlockState.RECEIVING:
                self._state[block] = BlockState.QUARANTINED
                quarantined.append(ref)
            elif self._ref_count[block] == 0:
                if self._key[block] is not None:
                    self._cached[block] = None
                else:
                    self._set_free(block)
        return quarantined

    # --- taking blocks -----------------------------------------------------------------------------------------------

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` could give: free and cached."""
        return len(self._free) + len(self._cached)

    def match(self, keys: Sequence[BlockKey]) -> int:
        """How many leading keys have a committed block here."""
        for count, key in enumerate(keys):
            if key not in self._by_key:
                return count
        return len(keys)

    def acquire(self, owner: str, keys: Sequence[BlockKey]) -> list[BlockRef]:
        """Hold the blocks of the longest committed prefix of `keys`."""
        hold = self._holds[owner]
        refs: list[BlockRef] = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            self._cached.pop(block, None)
            refs.append(self._take(hold, block))
        return refs

    def allocate(self, owner: str, count: int) -> list[BlockRef]:
        """`count` fresh blocks, evicting cached ones if need be. Raises NoRoom, and takes nothing then."""
        if count > self.num_available:
            raise NoRoom(f"{count} blocks wanted, {self.num_available} of {self.num_blocks} available")
        hold = self._holds[owner]
        refs: list[BlockRef] = []
        for _ in range(count):
            if not self._free:
                self._evict(next(iter(self._cached)))
            block = self._free.pop()
            self._state[block] = BlockState.ALLOCATED
            self._generation[block] += 1
            refs.append(self._take(hold, block))
        return refs

    # --- what a block holds ------------------------------------------------------------------------------------------

    def commit(self, owner: str, ref: BlockRef, key: BlockKey) -> BlockRef:
        """The block is full and computed: make it visible under `key`. Returns the block that `owner` has from now on.

        If another block has that key already, the owner gets that one in its place, and this one is freed.
        Raises StaleBlock.
        """
        self._check(ref, BlockState.ALLOCATED)
        if key in self._by_key:
            return self._exchange(self._holds[owner], ref, self._by_key[key])
        self._state[ref.block_id] = BlockState.COMMITTED
        self._key[ref.block_id] = key
        self._by_key[key] = ref.block_id
        self._note(key, was_visible=False)
        return ref

    def receive(self, refs: Iterable[BlockRef]) -> None:
        """Bytes from a peer may land in these blocks from now on. Raises StaleBlock."""
        for ref in refs:
            self._check(ref, BlockState.ALLOCATED)
            self._state[ref.block_id] = BlockState.RECEIVING

    def land(self, ref: BlockRef) -> None:
        """The bytes have landed and are verified. Raises StaleBlock."""
        self._check(ref, BlockState.RECEIVING)
        self._state[ref.block_id] = BlockState.ALLOCATED

    def drained(self, ref: BlockRef) -> None:
        """Proven: nothing lands in this quarantined block any more. Raises StaleBlock."""
        self._check(ref, BlockState.QUARANTINED)
        self._set_free(ref.block_id)

    def generation(self, block_id: int) -> int:
        return self._generation[block_id]

    # --- looking at it -----------------------------------------------------------------------------------------------

    def clear_cached(self) -> int:
        """Evict every cached block; returns how many."""
        blocks = list(self._cached)
        for block in blocks:
            self._evict(block)
        return len(blocks)

    def visible_keys(self) -> list[BlockKey]:
        """Keys that `match` can find, as a snapshot for a new listener."""
        return list(self._by_key)

    def drain_events(self) -> PoolEvents:
        """Changes of visibility since the last drain, netted per key."""
        stored = tuple(k for k, was in self._changed.items() if not was and k in self._by_key)
        removed = tuple(k for k, was in self._changed.items() if was and k not in self._by_key)
        self._changed.clear()
        return PoolEvents(stored, removed)

    def ledger(self, now_s: float) -> Ledger:
        """Counted from the blocks' own states, not from running totals: a mistake shows as a sum that is off."""
        counts = dict.fromkeys(("free", "cached", "held", "sending", "receiving", "quarantined"), 0)
        free, cached = set(self._free), self._cached
        sending = {r.block_id for h in self._holds.values() if h.kind is HoldKind.SEND for r in h.blocks}
        for block, state in enumerate(self._state):
            if state is BlockState.FREE and block in free:
                counts["free"] += 1
            elif state is BlockState.RECEIVING:
                counts["receiving"] += 1
            elif state is BlockState.QUARANTINED:
                counts["quarantined"] += 1
            elif self._ref_count[block] == 0 and state is BlockState.COMMITTED and block in cached:
                counts["cached"] += 1
            elif self._ref_count[block] > 0 and state is not BlockState.FREE:
                counts["sending" if block in sending else "held"] += 1
        holds = tuple(
            LedgerEntry(
                owner,
                hold.kind.value,
                len(hold.blocks),
                now_s - hold.since_s,
                None if hold.deadline_s is None else hold.deadline_s - now_s,
            )
            for owner, hold in self._holds.items()
        )
        return Ledger(total=self.num_blocks, **counts, holds=holds)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _take(self, hold: Hold, block: int) -> BlockRef:
        ref = BlockRef(block, self._generation[block])
        self._ref_count[block] += 1
        hold.blocks.append(ref)
        return ref

    def _exchange(self, hold: Hold, ref: BlockRef, block: int) -> BlockRef:
        """Hold the committed `block` in the place of a private one, which is freed."""
        self._cached.pop(block, None)
        twin = BlockRef(block, self._generation[block])
        hold.blocks[hold.blocks.index(ref)] = twin
        self._ref_count[block] += 1
        self._ref_count[ref.block_id] -= 1
        self._set_free(ref.block_id)
        return twin

    def _check(self, ref: BlockRef, *states: BlockState) -> None:
        block = ref.block_id
        if not 0 <= block < self.num_blocks or self._generation[block] != ref.generation:
            raise StaleBlock(f"{ref} is not in its current life")
        if self._state[block] not in states:
            raise StaleBlock(f"{ref} is {self._state[block].value}, not {' or '.join(s.value for s in states)}")

    def _evict(self, block: int) -> None:
        del self._cached[block]
        key = self._key[block]
        assert key is not None
        del self._by_key[key]
        self._key[block] = None
        self._note(key, was_visible=True)
        self._set_free(block)

    def _set_free(self, block: int) -> None:
        self._state[block] = BlockState.FREE
        self._free.append(block)

    def _note(self, key: BlockKey, *, was_visible: bool) -> None:
        self._changed.setdefault(key, was_visible)
