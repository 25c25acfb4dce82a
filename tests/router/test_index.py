"""The index says what a naive map of sets says, after any history of events."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore.keys import GROUP_BLOCKS, BlockKey, KeyChain, block_keys, landmarks, root_key
from router.index import PrefixIndex, split_keys

KEYS = [BlockKey(bytes([number]) * 16) for number in range(40)]
slots = st.integers(0, 4)
some_keys = st.lists(st.sampled_from(KEYS), max_size=24)


class AgainstNaive(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.naive: dict[int, set[BlockKey]] = {}

    @rule(slot=slots, keys=some_keys)
    def stored(self, slot: int, keys: list[BlockKey]) -> None:
        self.index.stored(slot, keys)
        self.naive.setdefault(slot, set()).update(keys)

    @rule(slot=slots, keys=some_keys)
    def removed(self, slot: int, keys: list[BlockKey]) -> None:
        self.index.removed(slot, keys)
        self.naive.setdefault(slot, set()).difference_update(keys)

    @rule(slot=slots, keys=some_keys)
    def snapshot(self, slot: int, keys: list[BlockKey]) -> None:
        self.index.snapshot(slot, keys)
        self.naive[slot] = set(keys)

    @rule(slot=slots)
    def worker_leaves(self, slot: int) -> None:
        self.index.remove_worker(slot)
        self.naive.pop(slot, None)

    @rule(slot=slots, depth=st.integers(0, len(KEYS)))
    def prefix(self, slot: int, depth: int) -> None:
        self.snapshot(slot, KEYS[:depth])

    @rule(length=st.integers(0, len(KEYS)))
    def match(self, length: int) -> None:
        """As far as an unbroken prefix reaches, and never further than the last key held."""
        depths = self.index.match(KEYS[:length]).by_slot()
        for slot, held in self.naive.items():
            unbroken = next((n for n, key in enumerate(KEYS[:length]) if key not in held), length)
            if held.issubset(KEYS[:unbroken]) or unbroken in (0, length):
                assert depths.get(slot, 0) == unbroken
            else:
                assert depths[slot] >= unbroken
                assert KEYS[depths[slot] - 1] in held

    @invariant()
    def sizes_agree(self) -> None:
        assert len(self.index) == len(set().union(*self.naive.values()))
        assert all(self.index.count(slot) == len(held) for slot, held in self.naive.items())


AgainstNaive.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
TestAgainstNaive = AgainstNaive.TestCase


def test_an_index_that_all_workers_left_is_empty() -> None:
    index = PrefixIndex()
    index.stored(0, KEYS)
    index.stored(3, KEYS[:4])
    index.remove_worker(0)
    assert index.match(KEYS).by_slot() == {3: 4}
    index.remove_worker(3)
    assert len(index) == 0
    assert index.match(KEYS).by_slot() == {}


@given(st.dictionaries(slots, st.integers(0, 60), max_size=5), st.integers(0, 60))
def test_prefixes_of_any_depth_are_found_whole(depths: dict[int, int], length: int) -> None:
    tokens = range(60 * 4)
    keys, index = block_keys(root_key(b"f"), tokens, 4), PrefixIndex()
    for slot, depth in depths.items():
        index.stored(slot, keys[:depth])
    expected = {slot: min(depth, length) for slot, depth in depths.items() if min(depth, length)}
    assert index.match(keys[:length]).by_slot() == expected
    assert index.match(KeyChain(root_key(b"f"), tokens[: length * 4], 4)).by_slot() == expected


@given(st.lists(st.integers(0, 30), min_size=1, max_size=64))
@example([24] * 64)
@example([24] * 3)
def test_a_column_has_what_each_slot_holds(depths: list[int]) -> None:
    index = PrefixIndex()
    for slot, depth in enumerate(depths):
        index.stored(slot, KEYS[:depth])
    match = index.match(KEYS[:24])
    expected = [min(depth, 24) for depth in depths]
    assert match.column(64).tolist() == expected + [0] * (64 - len(depths))
    assert [match.of(slot) for slot in range(len(depths))] == expected


def test_what_is_expected_counts_until_it_came_or_its_time_is_over() -> None:
    index = PrefixIndex()
    for slot in (0, 1):
        index.stored(slot, KEYS[:2])
    index.expect(0, KEYS[:6], now_s=0.0, expires_s=10.0)
    index.expect(1, KEYS[:4], now_s=1.0, expires_s=20.0)
    assert index.match(KEYS).by_slot() == {0: 6, 1: 4}
    assert (index.count(0), index.count_expected(0)) == (2, 4)
    index.stored(0, KEYS[2:4])  # half of it came
    index.expire(10.0)
    assert index.match(KEYS).by_slot() == {0: 4, 1: 4}
    index.expect(1, KEYS[:4], now_s=15.0, expires_s=40.0)  # once more
    index.expire(39.0)
    assert index.match(KEYS).of(1) == 4
    index.expire(40.0)
    assert index.match(KEYS).by_slot() == {0: 4, 1: 2}
    index.remove_worker(0)
    index.remove_worker(1)
    assert len(index) == 0


def test_nothing_is_expected_of_a_worker_that_is_gone_and_never_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    index = PrefixIndex()
    index.expect(0, KEYS, now_s=0.0, expires_s=9.0)
    assert len(index) == 0
    monkeypatch.setattr("router.index.MAX_EXPECTED", 5)
    index.stored(0, KEYS[:1])
    for _ in range(3):
        index.expect(0, KEYS, now_s=0.0, expires_s=9.0)
    assert index.count_expected(0) == 5


@given(st.integers(1, 70), st.integers(0, 70))
def test_landmarks_are_enough_to_follow_a_prompt(sent: int, shared: int) -> None:
    """A second prompt that shares `shared` blocks finds the first one's worker, to the group; one block at least."""
    first = KeyChain(root_key(b"f"), range(sent * 4), 4)
    tokens = [*range(min(shared, sent) * 4), *range(10_000, 10_000 + 4 * 40)]
    index = PrefixIndex()
    index.stored(3, [])
    index.expect(3, landmarks(first), now_s=0.0, expires_s=1.0)
    found = index.match(KeyChain(root_key(b"f"), tokens, 4)).of(3)
    shared = min(shared, sent)
    assert max(shared // GROUP_BLOCKS * GROUP_BLOCKS, min(shared, 1)) <= found <= shared
    assert index.match(first).of(3) == sent


def test_a_worker_without_the_first_block_holds_nothing() -> None:
    keys = block_keys(root_key(b"f"), range(40), 4)
    index = PrefixIndex()
    index.stored(2, keys[1:])
    assert index.match(keys).by_slot() == {}


def test_a_cut_key_is_refused() -> None:
    assert split_keys(b"") == []
    assert split_keys(b"".join(KEYS)) == KEYS
    with pytest.raises(ValueError, match="17 bytes"):
        split_keys(bytes(17))
