"""The store index says what nodes hold, in which tier, whatever is lost or doubled; fetches are cut where it pays."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.keys import BlockKey
from kvstore.store.events import EventKind, EventLog, KvEvent
from kvstore.store.rates import PRIORS
from kvstore.store.tier import Tier
from router.columns import Columns, Seats
from router.index import PrefixIndex
from router.policy import POLICIES, Candidate, Decision, Need, Phase, Role, Speed
from router.store_index import StoreIndex

KEYS = [BlockKey(bytes([number]) * 16) for number in range(40)]
TIERS = (Tier.HOST, Tier.DISK)
BLOCK_BYTES = 1 << 20


def apply(index: StoreIndex, node: int, event: KvEvent) -> None:
    match event.kind:
        case EventKind.STORED:
            index.stored(node, event.sequence, event.tier, event.keys)
        case EventKind.REMOVED:
            index.removed(node, event.sequence, event.tier, event.keys)
        case EventKind.CLEARED:
            index.cleared(node, event.sequence, event.tier)
        case EventKind.SNAPSHOT_END:
            index.snapshot_ended(node, event.sequence)


def lengths(held: dict[Tier, set[BlockKey]]) -> tuple[int, int]:
    """Leading blocks in the host tier, and in any."""
    both = held[Tier.HOST] | held[Tier.DISK]

    def leading(of: set[BlockKey]) -> int:
        return next((n for n, key in enumerate(KEYS) if key not in of), len(KEYS))

    return leading(held[Tier.HOST]), leading(both)


# What a node does to a chain: in each tier it grows and shrinks at its end, as a node evicts children first.
steps = st.lists(
    st.tuples(st.sampled_from(TIERS), st.integers(0, len(KEYS)), st.sampled_from(["fine", "lost", "twice"])),
    max_size=30,
)


class Node:
    """The truth, its log, and an index that hears of it."""

    def __init__(self) -> None:
        self.held: dict[Tier, set[BlockKey]] = {tier: set() for tier in TIERS}
        self.log = EventLog()
        self.index = StoreIndex()
        self.subscribe()

    def subscribe(self) -> None:
        subscription = self.log.subscribe({tier: sorted(keys) for tier, keys in self.held.items()})
        assert subscription is not None
        self.index.join(3)
        while not subscription._waiting.empty():
            event = subscription._waiting.get_nowait()
            assert event is not None
            apply(self.index, 3, event)
        subscription.end()

    def change(self, tier: Tier, length: int) -> KvEvent | None:
        """It holds so many blocks of the chain in this tier from now on."""
        before, after = self.held[tier], set(KEYS[:length])
        if before == after:
            return None
        self.held[tier] = after
        kind = EventKind.STORED if after > before else EventKind.REMOVED if after else EventKind.CLEARED
        keys = tuple(sorted(before ^ after)) if after else ()
        self.log.emit(kind, tier, keys)
        return KvEvent(self.log.sequence, kind, tier, keys)

    def known(self) -> tuple[float, float]:
        stored = self.index.match(KEYS)
        return tuple(stored.rows[[6, 7]]) if stored is not None else (0.0, 0.0)


@given(steps)
def test_it_is_what_the_node_holds_unless_the_last_event_was_lost(steps: list[tuple[Tier, int, str]]) -> None:
    node = Node()
    for tier, length, fate in steps:
        event = node.change(tier, length)
        if event is None or fate == "lost":
            continue
        try:
            for _ in range(1 + (fate == "twice")):
                apply(node.index, 3, event)
        except ValueError:  # one before it was lost
            node.subscribe()
        assert node.known() == lengths(node.held)
    node.subscribe()
    assert node.known() == lengths(node.held)
    node.index.leave(3)
    assert (len(node.index), len(node.index._index), node.index.match(KEYS)) == (0, 0, None)


def test_nothing_counts_before_the_snapshot_is_complete() -> None:
    index = StoreIndex()
    index.join(0)
    index.stored(0, 7, Tier.HOST, KEYS[:4])
    assert index.match(KEYS) is None
    index.snapshot_ended(0, 7)
    stored = index.match(KEYS)
    assert stored is not None
    assert (stored.on(0), stored.on(-1), stored.most) == (4, 0, 4)


# --- what is fetched -------------------------------------------------------------------------------------------------

TOKENS = 16 * len(KEYS) + 1
NEED = Need(Phase.PROMPT, TOKENS, 8, 16)


def decide(workers: dict[str, tuple[int, bool]], held: dict[int, dict[Tier, int]], pool: int = 0) -> Decision:
    """`workers` by name: their node and whether it shares; `held` by node: blocks of the chain by tier. The first
    worker holds `pool` blocks itself. All compute 1,000 tokens/s."""
    index, columns, pools = StoreIndex(), Columns(), PrefixIndex()
    for node, tiers in held.items():
        index.join(node)
        for tier, blocks in tiers.items():
            index.stored(node, 0, tier, KEYS[:blocks])
        index.snapshot_ended(node, 0)
    records = []
    for slot, (name, (node, shares)) in enumerate(workers.items()):
        columns.reset(slot)
        columns.set_speed(slot, Speed(prefill_tokens_per_s=((8, 1000.0),)))
        record = Candidate(
            name, Role.MIXED, True, "", 1 << 20, 64, 1 << 10, BLOCK_BYTES, store_node=node, store_shares=shares
        )
        records.append((slot, record))
    pools.stored(0, KEYS[:pool])
    candidates = columns.candidates(Seats.of(records), pools.match(KEYS), 0.0, None, index.match(KEYS))
    return POLICIES["cost"].decide(NEED, candidates, 0)


def seconds(blocks: dict[Tier, int]) -> float:
    return sum(PRIORS[tier].latency_s + n * BLOCK_BYTES / PRIORS[tier].bytes_per_s for tier, n in blocks.items())


def test_blocks_come_from_the_nearest_tier_and_explain_says_so() -> None:
    decision = decide({"here": (0, False), "nowhere": (-1, False)}, {0: {Tier.HOST: 10, Tier.DISK: 30}}, pool=4)
    chosen = decision.chosen
    assert chosen is not None
    assert (chosen.worker_id, chosen.matched_blocks, chosen.fetched_blocks, chosen.fetch_tier) == (
        "here",
        4,
        26,
        "disk",
    )
    assert chosen.fetch_s == pytest.approx(seconds({Tier.HOST: 6, Tier.DISK: 20})) == chosen.terms["fetch"]
    assert chosen.uncached_tokens == TOKENS - 30 * 16
    assert chosen.uncached_s == pytest.approx(chosen.uncached_tokens / 1000)
    assert sum(chosen.terms.values()) == pytest.approx(chosen.cost)
    assert (decision.best_hit_blocks, decision.reachable_blocks) == (4, 30)
    other = decision.runner_up
    assert other is not None
    assert (other.fetched_blocks, other.fetch_tier, other.uncached_tokens) == (0, "", TOKENS)


def test_another_nodes_blocks_count_where_nodes_share() -> None:
    held = {0: {Tier.HOST: 5}, 1: {Tier.DISK: 40}}
    decision = decide({"shares": (0, True), "alone": (0, False)}, held)
    by_id = {each.worker_id: each for each in decision.considered}
    assert (by_id["shares"].fetched_blocks, by_id["shares"].fetch_tier) == (40, "remote")
    assert by_id["shares"].fetch_s == pytest.approx(seconds({Tier.HOST: 5, Tier.REMOTE: 35}))
    assert (by_id["alone"].fetched_blocks, by_id["alone"].fetch_tier) == (5, "host")


def test_what_is_computed_sooner_is_not_fetched() -> None:
    """Two blocks beyond the host tier are not worth the latency of a disk that is as slow as this one."""
    index, columns = StoreIndex(), Columns()
    index.join(0)
    index.stored(0, 0, Tier.HOST, KEYS[:10])
    index.stored(0, 0, Tier.DISK, KEYS[:12])
    index.snapshot_ended(0, 0)
    columns.reset(0)
    columns.set_speed(0, Speed(prefill_tokens_per_s=((8, 1000.0),)))
    columns.set_byte_s(0, [1e-10, 1e-6, 1e-6])
    record = Candidate("a", Role.MIXED, True, "", 1 << 20, 64, 1 << 10, BLOCK_BYTES, store_node=0)
    seats = Seats.of([(0, record)])
    candidates = columns.candidates(seats, PrefixIndex().match(KEYS), 0.0, None, index.match(KEYS))
    chosen = POLICIES["cost"].decide(NEED, candidates, 0).chosen
    assert chosen is not None
    assert (chosen.fetched_blocks, chosen.fetch_tier) == (10, "host")


def test_the_last_token_is_computed_even_if_every_block_is_stored() -> None:
    exact = Need(Phase.PROMPT, 16 * len(KEYS), 8, 16)
    index, columns = StoreIndex(), Columns()
    index.join(0)
    index.stored(0, 0, Tier.HOST, KEYS)
    index.snapshot_ended(0, 0)
    columns.reset(0)
    record = Candidate("a", Role.MIXED, True, "", 1 << 20, 64, 1 << 10, BLOCK_BYTES, store_node=0)
    candidates = columns.candidates(Seats.of([(0, record)]), PrefixIndex().match(KEYS), 0.0, None, index.match(KEYS))
    chosen = POLICIES["cost"].decide(exact, candidates, 0).chosen
    assert chosen is not None
    assert (chosen.fetched_blocks, chosen.uncached_tokens) == (len(KEYS) - 1, 16)
