"""The index says what a naive map of sets says, after any history of events."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore.keys import BlockKey, KeyChain, block_keys, root_key
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


AgainstNaive.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
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
