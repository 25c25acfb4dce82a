"""Any order of calls leaves the pool equal to a plain model of it: conservation, ownership, visibility, eviction order.

Owners behave as the scheduler does: each has a text, holds its cached prefix, and commits its further blocks in order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.errors import NoRoom, StaleBlock
from kvstore.keys import BlockKey, block_keys, root_key
from kvstore.pool import BlockPool, BlockRef, BlockState, HoldKind

MAX_BLOCKS_OF_A_TEXT = 4
ROOTS = (root_key(b"one tenant"), root_key(b"another"))
CHAINS = [block_keys(root, text, 1) for root in ROOTS for text in product((0, 1), repeat=MAX_BLOCKS_OF_A_TEXT)]
OWNERS = ("a", "b", "c", "d")


@dataclass
class Owner:
    """What the model knows of one hold: `blocks[:committed]` carry `keys[:committed]`."""

    kind: HoldKind
    deadline_s: float | None
    keys: list[BlockKey]
    blocks: list[BlockRef] = field(default_factory=list)
    committed: int = 0


class PoolMachine(RuleBasedStateMachine):
    @initialize(num_blocks=st.integers(1, 10))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, 1)
        self.state = dict.fromkeys(range(num_blocks), BlockState.FREE)
        self.generation = dict.fromkeys(range(num_blocks), 0)
        self.owners: dict[str, Owner] = {}
        self.visible: dict[BlockKey, int] = {}
        self.lru: list[int] = []  # committed, nobody left; oldest first
        self.told: set[BlockKey] = set()  # what a listener to the events believes
        self.past: set[BlockRef] = set()
        self.now_s = 0.0

    # --- helpers -----------------------------------------------------------------------------------------------------

    def owner(self, data: st.DataObject, *kinds: HoldKind) -> tuple[str, Owner] | None:
        names = [name for name, owner in self.owners.items() if owner.kind in (kinds or HoldKind)]
        name = data.draw(st.sampled_from(names)) if names else None
        return None if name is None else (name, self.owners[name])

    def num_refs(self, block: int) -> int:
        return sum(ref.block_id == block for owner in self.owners.values() for ref in owner.blocks)

    def give_back(self, ref: BlockRef) -> None:
        """One reference less; the model's owners no longer have it."""
        if self.num_refs(ref.block_id):
            return
        if self.state[ref.block_id] is BlockState.COMMITTED:
            self.lru.append(ref.block_id)
        else:
            self.state[ref.block_id] = BlockState.FREE

    def evict_oldest(self) -> None:
        block = self.lru.pop(0)
        key = next(key for key, held in self.visible.items() if held == block)
        children = [chain[i + 1] for chain in CHAINS for i in range(len(chain) - 1) if chain[i] == key]
        assert not any(child in self.visible for child in children), "a child outlives its parent"
        del self.visible[key]
        self.state[block] = BlockState.FREE

    # --- rules -------------------------------------------------------------------------------------------------------

    @rule(
        name=st.sampled_from(OWNERS),
        receives=st.booleans(),
        root=st.sampled_from(ROOTS),
        text=st.lists(st.integers(0, 1), min_size=1, max_size=MAX_BLOCKS_OF_A_TEXT),
        within_s=st.floats(0.5, 5),
    )
    def open(self, name: str, receives: bool, root: BlockKey, text: list[int], within_s: float) -> None:
        if name in self.owners:
            return
        kind = HoldKind.RECEIVE if receives else HoldKind.COMPUTE
        owner = Owner(kind, self.now_s + within_s if receives else None, block_keys(root, text, 1))
        self.pool.open(name, kind, self.now_s, owner.deadline_s)
        hit = next((n for n, key in enumerate(owner.keys) if key not in self.visible), len(owner.keys))
        assert self.pool.match(owner.keys) == hit
        owner.blocks = self.pool.acquire(name, owner.keys)
        owner.committed = hit
        assert [ref.block_id for ref in owner.blocks] == [self.visible[key] for key in owner.keys[:hit]]
        self.lru = [block for block in self.lru if block not in {ref.block_id for ref in owner.blocks}]
        self.owners[name] = owner

    @rule(data=st.data(), count=st.integers(0, 6))
    def allocate(self, data: st.DataObject, count: int) -> None:
        if (found := self.owner(data)) is None:
            return
        name, owner = found
        free = [block for block, state in self.state.items() if state is BlockState.FREE]
        if count > len(free) + len(self.lru):
            before = self.pool.ledger(self.now_s)
            with pytest.raises(NoRoom):
                self.pool.allocate(name, count)
            assert self.pool.ledger(self.now_s) == before
            return
        for _ in range(count - len(free)):
            self.evict_oldest()
        refs = self.pool.allocate(name, count)
        assert len({ref.block_id for ref in refs}) == count
        for ref in refs:
            assert self.state[ref.block_id] is BlockState.FREE
            assert ref.generation == self.generation[ref.block_id] + 1
            self.state[ref.block_id] = BlockState.ALLOCATED
            self.generation[ref.block_id] = ref.generation
        owner.blocks += refs
        self.past.update(refs)

    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        if (found := self.owner(data)) is None:
            return
        name, owner = found
        i = owner.committed
        if i >= min(len(owner.blocks), len(owner.keys)):
            return
        ref, key = owner.blocks[i], owner.keys[i]
        if self.state[ref.block_id] is not BlockState.ALLOCATED:
            with pytest.raises(StaleBlock):
                self.pool.commit(name, ref, key)
            return
        got = self.pool.commit(name, ref, key)
        if key in self.visible:
            twin = self.visible[key]
            assert got == BlockRef(twin, self.generation[twin])
            owner.blocks[i] = got
            self.state[ref.block_id] = BlockState.FREE
            self.lru = [block for block in self.lru if block != twin]
        else:
            assert got == ref
            self.visible[key] = ref.block_id
            self.state[ref.block_id] = BlockState.COMMITTED
        owner.committed += 1

    @rule(data=st.data())
    def receive(self, data: st.DataObject) -> None:
        if (found := self.owner(data, HoldKind.RECEIVE)) is None:
            return
        refs = [ref for ref in found[1].blocks if self.state[ref.block_id] is BlockState.ALLOCATED]
        self.pool.receive(refs)
        self.state.update((ref.block_id, BlockState.RECEIVING) for ref in refs)

    @rule(data=st.data())
    def land(self, data: st.DataObject) -> None:
        if (found := self.owner(data, HoldKind.RECEIVE)) is None:
            return
        refs = [ref for ref in found[1].blocks if self.state[ref.block_id] is BlockState.RECEIVING]
        if refs:
            ref = data.draw(st.sampled_from(refs))
            self.pool.land(ref)
            self.state[ref.block_id] = BlockState.ALLOCATED

    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        if (found := self.owner(data, HoldKind.RECEIVE)) is None:
            return
        name, owner = found
        if all(self.state[ref.block_id] is not BlockState.RECEIVING for ref in owner.blocks):
            self.pool.keep(name)
            owner.kind, owner.deadline_s = HoldKind.COMPUTE, None

    @rule(data=st.data(), within_s=st.floats(0.5, 5))
    def lend(self, data: st.DataObject, within_s: float) -> None:
        if found := self.owner(data, HoldKind.COMPUTE):
            found[1].kind, found[1].deadline_s = HoldKind.SEND, self.now_s + within_s
            self.pool.lend(found[0], self.now_s + within_s)

    @rule(name=st.sampled_from(OWNERS))
    def release(self, name: str) -> None:
        quarantined = self.pool.release(name)
        owner = self.owners.pop(name, None)
        receiving: set[BlockRef] = set()
        for ref in reversed(owner.blocks if owner else []):
            if self.state[ref.block_id] is BlockState.RECEIVING:
                self.state[ref.block_id] = BlockState.QUARANTINED
                receiving.add(ref)
            else:
                self.give_back(ref)
        assert len(quarantined) == len(receiving)
        assert set(quarantined) == receiving

    @precondition(lambda self: BlockState.QUARANTINED in self.state.values())
    @rule(data=st.data())
    def drained(self, data: st.DataObject) -> None:
        blocks = [block for block, state in self.state.items() if state is BlockState.QUARANTINED]
        block = data.draw(st.sampled_from(blocks))
        self.pool.drained(BlockRef(block, self.generation[block]))
        self.state[block] = BlockState.FREE

    @precondition(lambda self: self.past)
    @rule(data=st.data())
    def late(self, data: st.DataObject) -> None:
        """A peer's news of any life that a block ever had: refused unless it is right for the present one."""
        ref = data.draw(st.sampled_from(sorted(self.past, key=lambda r: (r.block_id, r.generation))))
        current = self.generation[ref.block_id] == ref.generation
        state = self.state[ref.block_id]
        if not (current and state is BlockState.RECEIVING):
            with pytest.raises(StaleBlock):
                self.pool.land(ref)
        if not (current and state is BlockState.QUARANTINED):
            with pytest.raises(StaleBlock):
                self.pool.drained(ref)
        if not (current and state is BlockState.ALLOCATED):
            with pytest.raises(StaleBlock):
                self.pool.receive([ref])

    @rule(seconds=st.floats(0, 3))
    def pass_time(self, seconds: float) -> None:
        """Time alone changes nothing but who is late."""
        self.now_s += seconds
        late = {n for n, o in self.owners.items() if o.deadline_s is not None and o.deadline_s <= self.now_s}
        assert set(self.pool.ledger(self.now_s).overdue) == late

    @rule()
    def clear_cached(self) -> None:
        assert self.pool.clear_cached() == len(self.lru)
        while self.lru:
            self.evict_oldest()

    @rule()
    def drain_events(self) -> None:
        events = self.pool.drain_events()
        assert self.told.isdisjoint(events.stored)
        assert self.told.issuperset(events.removed)
        assert len(set(events.stored) | set(events.removed)) == len(events.stored) + len(events.removed)
        self.told = (self.told | set(events.stored)) - set(events.removed)
        assert self.told == set(self.visible)

    @rule()
    def empty(self) -> None:
        """Releasing all and draining all leaves free and cached blocks only."""
        for name in OWNERS:
            self.release(name)
        for block, state in self.state.items():
            if state is BlockState.QUARANTINED:
                self.pool.drained(BlockRef(block, self.generation[block]))
                self.state[block] = BlockState.FREE
        ledger = self.pool.ledger(self.now_s)
        assert ledger.idle
        assert not ledger.holds

    # --- what holds after each ---------------------------------------------------------------------------------------

    @invariant()
    def ledger_is_that_of_the_model(self) -> None:
        ledger = self.pool.ledger(self.now_s)
        assert ledger.sums
        states = list(self.state.values())
        sent = {r.block_id for owner in self.owners.values() if owner.kind is HoldKind.SEND for r in owner.blocks}
        held = {b for b, s in self.state.items() if s in (BlockState.ALLOCATED, BlockState.COMMITTED)} - set(self.lru)
        assert ledger.free == states.count(BlockState.FREE)
        assert ledger.cached == len(self.lru)
        assert ledger.receiving == states.count(BlockState.RECEIVING)
        assert ledger.quarantined == states.count(BlockState.QUARANTINED)
        assert ledger.sending == len(held & sent)
        assert ledger.held == len(held - sent)
        assert self.pool.num_available == ledger.free + ledger.cached
        assert {(e.owner, e.num_blocks) for e in ledger.holds} == {(n, len(o.blocks)) for n, o in self.owners.items()}

    @invariant()
    def exactly_what_is_committed_can_be_found(self) -> None:
        assert set(self.pool.visible_keys()) == set(self.visible)
        for chain in CHAINS:
            hit = next((n for n, key in enumerate(chain) if key not in self.visible), len(chain))
            assert self.pool.match(chain) == hit
            assert all(key not in self.visible for key in chain[hit:]), "a child without its parent"

    @invariant()
    def generations_are_those_of_the_model(self) -> None:
        assert {block: self.pool.generation(block) for block in self.generation} == self.generation

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            self.empty()
            self.drain_events()


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=120, stateful_step_count=60)
