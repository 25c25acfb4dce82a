"""The index says what a naive map of sets says, after any history of events."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore.keys import BlockKey, block_keys, root_key
from router.index import PrefixIndex, split_keys

KEYS = [BlockKey(bytes([number]) * 16) for number in range(12)]
slots = st.integers(0, 4)
some_keys = st.lists(st.sampled_from(KEYS), max_size=8)


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

    @rule(keys=some_keys)
    def match(self, keys: list[BlockKey]) -> None:
        expected = {}
        for slot, held in self.naive.items():
            depth = next((n for n, key in enumerate(keys) if key not in held), len(keys))
            if depth:
                expected[slot] = depth
        assert self.index.match(keys) == expected

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
    assert index.match(KEYS) == {3: 4}
    index.remove_worker(3)
    assert len(index) == 0
    assert index.match(KEYS) == {}


def test_only_an_unbroken_prefix_counts() -> None:
    keys = block_keys(root_key(b"f"), range(40), 4)
    index = PrefixIndex()
    index.stored(1, keys[:3] + keys[5:])
    index.stored(2, keys[1:])
    assert index.match(keys) == {1: 3}


def test_a_cut_key_is_refused() -> None:
    assert split_keys(b"") == []
    assert split_keys(b"".join(KEYS)) == KEYS
    with pytest.raises(ValueError, match="17 bytes"):
        split_keys(bytes(17))
