"""Each state of a block is left only as the pool's drawing shows; what is stale is refused, what is held stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvstore.errors import NoRoom, StaleBlock
from kvstore.keys import BlockKey, block_keys, root_key
from kvstore.pool import BlockPool, BlockRef, HoldKind

KEYS = block_keys(root_key(b"model"), range(32), 4)
OTHER = block_keys(root_key(b"other"), range(32), 4)


def make_pool(num_blocks: int = 8) -> BlockPool:
    return BlockPool(num_blocks, 4)


def compute(pool: BlockPool, owner: str, keys: list[BlockKey]) -> list[BlockRef]:
    """Hold `keys` as a sequence that has just computed what was not there."""
    pool.open(owner, HoldKind.COMPUTE, 0.0)
    refs = pool.acquire(owner, keys)
    fresh = pool.allocate(owner, len(keys) - len(refs))
    return refs + [pool.commit(owner, ref, key) for ref, key in zip(fresh, keys[len(refs) :], strict=True)]


def receive(pool: BlockPool, owner: str, count: int, deadline_s: float = 10.0) -> list[BlockRef]:
    pool.open(owner, HoldKind.RECEIVE, 0.0, deadline_s)
    refs = pool.allocate(owner, count)
    pool.receive(refs)
    return refs


def counts(pool: BlockPool) -> dict[str, int]:
    """The ledger's numbers that are not 0."""
    ledger = pool.ledger(0.0)
    assert ledger.sums
    names = ("free", "cached", "held", "sending", "receiving", "quarantined")
    return {name: getattr(ledger, name) for name in names if getattr(ledger, name)}


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 4), (-1, 4), (4, 0), (4, -1)])
def test_pool_without_blocks_or_tokens_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="a pool needs blocks"):
        BlockPool(num_blocks, block_size)


def test_uncommitted_block_is_never_found() -> None:
    pool = make_pool()
    pool.open("a", HoldKind.COMPUTE, 0.0)
    refs = pool.allocate("a", 2)
    assert pool.match(KEYS) == 0
    pool.commit("a", refs[1], KEYS[1])
    assert pool.match(KEYS) == 0, "the second block alone is no prefix"
    pool.commit("a", refs[0], KEYS[0])
    assert pool.match(KEYS) == 2
    assert pool.match(OTHER) == 0


def test_released_blocks_stay_cached_until_their_room_is_wanted_and_the_tail_goes_first() -> None:
    pool = make_pool(4)
    compute(pool, "a", KEYS[:3])
    assert counts(pool) == {"held": 3, "free": 1}
    pool.release("a")
    assert counts(pool) == {"cached": 3, "free": 1}
    pool.open("b", HoldKind.COMPUTE, 0.0)
    pool.allocate("b", 2)
    assert pool.match(KEYS) == 2
    pool.allocate("b", 1)
    assert pool.match(KEYS) == 1
    assert pool.num_available == 1


def test_least_recently_released_goes_first_and_use_renews() -> None:
    pool = make_pool(4)
    for owner, keys in (("a", KEYS[:2]), ("b", OTHER[:2])):
        compute(pool, owner, keys)
        pool.release(owner)
    compute(pool, "a", KEYS[:2])
    pool.release("a")
    compute(pool, "c", block_keys(root_key(b"third"), range(8), 4))
    assert (pool.match(KEYS), pool.match(OTHER)) == (2, 0)


def test_shared_blocks_stay_held_until_their_last_owner_leaves() -> None:
    pool = make_pool()
    a, b = compute(pool, "a", KEYS[:2]), compute(pool, "b", KEYS[:3])
    assert a == b[:2]
    pool.release("a")
    assert counts(pool) == {"held": 3, "free": 5}
    pool.release("b")
    assert counts(pool) == {"cached": 3, "free": 5}


def test_block_computed_twice_is_shared_and_the_second_copy_freed() -> None:
    pool = make_pool()
    for owner in "ab":
        pool.open(owner, HoldKind.COMPUTE, 0.0)
    (first,), second = pool.allocate("a", 1), pool.allocate("b", 2)
    assert pool.commit("a", first, KEYS[0]) == first
    assert pool.commit("b", second[0], KEYS[0]) == first
    assert pool.commit("b", second[1], KEYS[1]) == second[1]
    assert counts(pool) == {"held": 2, "free": 6}
    with pytest.raises(StaleBlock):
        pool.commit("b", second[0], KEYS[2])
    pool.release("a")
    assert counts(pool) == {"held": 2, "free": 6}
    pool.release("b")
    assert counts(pool) == {"cached": 2, "free": 6}


def test_child_of_a_block_computed_twice_does_not_outlive_its_parent() -> None:
    pool = make_pool(4)
    for owner in "ab":
        pool.open(owner, HoldKind.COMPUTE, 0.0)
    (first,), second = pool.allocate("a", 1), pool.allocate("b", 2)
    pool.commit("a", first, KEYS[0])
    for ref, key in zip(second, KEYS[:2], strict=True):
        pool.commit("b", ref, key)
    pool.release("a")
    pool.release("b")
    pool.open("c", HoldKind.COMPUTE, 0.0)
    pool.allocate("c", 3)
    assert pool.visible_keys() == [KEYS[0]]


def test_allocating_more_than_there_is_takes_and_evicts_nothing() -> None:
    pool = make_pool(4)
    compute(pool, "a", KEYS[:2])
    pool.release("a")
    pool.open("b", HoldKind.COMPUTE, 0.0)
    with pytest.raises(NoRoom, match="5 blocks wanted, 4 of 4 available"):
        pool.allocate("b", 5)
    assert counts(pool) == {"cached": 2, "free": 2}
    assert pool.match(KEYS) == 2


def test_held_cached_and_quarantined_blocks_are_told_apart_when_counting_room() -> None:
    pool = make_pool(8)
    compute(pool, "a", KEYS[:1])
    compute(pool, "b", OTHER[:2])
    pool.release("b")
    receive(pool, "c", 1)
    receive(pool, "d", 2)
    pool.release("d")
    assert counts(pool) == {"held": 1, "cached": 2, "receiving": 1, "quarantined": 2, "free": 2}
    assert pool.num_available == 4


# --- receiving -------------------------------------------------------------------------------------------------------


def test_landed_blocks_are_committed_like_computed_ones() -> None:
    pool = make_pool()
    refs = receive(pool, "a", 2)
    assert counts(pool) == {"receiving": 2, "free": 6}
    with pytest.raises(StaleBlock, match="is receiving"):
        pool.commit("a", refs[0], KEYS[0])
    for ref, key in zip(refs, KEYS[:2], strict=True):
        pool.land(ref)
        pool.commit("a", ref, key)
    pool.keep("a")
    assert pool.ledger(1e9).overdue == []
    pool.release("a")
    assert counts(pool) == {"cached": 2, "free": 6}


def test_aborted_transfer_quarantines_until_drained() -> None:
    pool = make_pool()
    refs = receive(pool, "a", 3)
    pool.land(refs[0])
    assert set(pool.release("a")) == set(refs[1:])
    assert counts(pool) == {"quarantined": 2, "free": 6}
    pool.open("b", HoldKind.COMPUTE, 0.0)
    taken = {ref.block_id for ref in pool.allocate("b", 6)}
    assert taken.isdisjoint({ref.block_id for ref in refs[1:]})
    pool.drained(refs[1])
    assert counts(pool) == {"held": 6, "quarantined": 1, "free": 1}


def test_acquired_prefix_of_an_aborted_arrival_is_not_quarantined() -> None:
    pool = make_pool()
    compute(pool, "a", KEYS[:2])
    pool.release("a")
    pool.open("b", HoldKind.RECEIVE, 0.0, 5.0)
    pool.acquire("b", KEYS)
    pool.receive(pool.allocate("b", 1))
    assert len(pool.release("b")) == 1
    assert counts(pool) == {"cached": 2, "quarantined": 1, "free": 5}


def test_late_landing_is_refused_in_every_later_life() -> None:
    pool = make_pool(1)
    (ref,) = receive(pool, "a", 1)
    pool.release("a")
    with pytest.raises(StaleBlock, match="is quarantined"):
        pool.land(ref)
    pool.drained(ref)
    with pytest.raises(StaleBlock, match="is free"):
        pool.land(ref)
    (newer,) = receive(pool, "b", 1)
    assert newer == BlockRef(ref.block_id, ref.generation + 1)
    for late in (pool.land, pool.drained, lambda r: pool.receive([r]), lambda r: pool.commit("b", r, KEYS[0])):
        with pytest.raises(StaleBlock, match="not in its current life"):
            late(ref)
    pool.land(newer)
    with pytest.raises(StaleBlock, match="is allocated"):
        pool.land(newer)


@pytest.mark.parametrize("ref", [BlockRef(8, 0), BlockRef(-1, 0), BlockRef(2**40, 1), BlockRef(0, 1)])
@pytest.mark.parametrize(
    "use",
    [BlockPool.land, BlockPool.drained, lambda p, r: p.receive([r]), lambda p, r: p.commit("a", r, KEYS[0])],
    ids=["land", "drained", "receive", "commit"],
)
def test_reference_to_no_life_is_refused(use: Callable[[BlockPool, BlockRef], object], ref: BlockRef) -> None:
    pool = make_pool()
    pool.open("a", HoldKind.COMPUTE, 0.0)
    with pytest.raises(StaleBlock):
        use(pool, ref)


def test_only_quarantine_is_left_by_being_drained() -> None:
    pool = make_pool()
    (computed,) = compute(pool, "a", KEYS[:1])
    (receiving,) = receive(pool, "b", 1)
    for ref in (computed, receiving):
        with pytest.raises(StaleBlock):
            pool.drained(ref)


# --- owners ----------------------------------------------------------------------------------------------------------


def test_release_is_idempotent_and_of_a_stranger_does_nothing() -> None:
    pool = make_pool()
    compute(pool, "a", KEYS[:2])
    assert pool.release("stranger") == []
    assert pool.release("a") == pool.release("a") == []
    assert counts(pool) == {"cached": 2, "free": 6}
    assert not pool.holds("a")


def test_owner_holds_once() -> None:
    pool = make_pool()
    pool.open("a", HoldKind.COMPUTE, 0.0)
    with pytest.raises(AssertionError):
        pool.open("a", HoldKind.COMPUTE, 0.0)


@pytest.mark.parametrize("kind", [HoldKind.SEND, HoldKind.RECEIVE])
def test_hold_that_crosses_a_process_needs_a_deadline(kind: HoldKind) -> None:
    with pytest.raises(AssertionError):
        make_pool().open("a", kind, 0.0)


def test_ledger_names_every_owner_with_age_and_deadline() -> None:
    pool = make_pool()
    compute(pool, "a", KEYS[:2])
    pool.lend("a", 30.0)
    receive(pool, "b", 1, deadline_s=7.0)
    ledger = pool.ledger(2.0)
    rows = [(e.owner, e.kind, e.num_blocks, e.age_s, e.expires_in_s) for e in ledger.holds]
    assert rows == [("a", "send", 2, 2.0, 28.0), ("b", "receive", 1, 2.0, 5.0)]
    assert (ledger.sending, ledger.receiving, ledger.idle) == (2, 1, False)
    assert pool.ledger(7.0).overdue == ["b"]
    assert pool.ledger(30.0).overdue == ["a", "b"]


# --- events ----------------------------------------------------------------------------------------------------------


def test_events_are_netted_between_two_drains() -> None:
    pool = make_pool(2)
    compute(pool, "a", KEYS[:2])
    events = pool.drain_events()
    assert (set(events.stored), events.removed) == (set(KEYS[:2]), ())
    pool.release("a")
    compute(pool, "b", OTHER[:1])
    pool.release("b")
    assert pool.clear_cached() == 2
    compute(pool, "c", KEYS[:1])
    events = pool.drain_events()
    # KEYS[0] went and came back, OTHER[0] came and went: nobody needs to know.
    assert (events.stored, events.removed) == ((), (KEYS[1],))
    assert pool.drain_events() == pool.drain_events()


def test_clearing_the_cache_leaves_held_blocks_alone() -> None:
    pool = make_pool()
    compute(pool, "a", KEYS[:2])
    compute(pool, "b", OTHER[:2])
    pool.release("b")
    assert pool.clear_cached() == 2
    assert pool.visible_keys() == KEYS[:2]
    assert counts(pool) == {"held": 2, "free": 6}
