"""The directory of the arena: it tells what was listed, or nothing; never a mix of two entries, never another slot."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.keys import BlockKey
from kvstore.store.directory import Directory, DirectoryWriter, directory_bytes
from tests.kvstore.store.blocks import chain

SLOTS = 64
ENTRY_BYTES = 40


class Table:
    """Both ends of one table."""

    def __init__(self, num_slots: int = SLOTS) -> None:
        self.memory = bytearray(directory_bytes(num_slots))
        self.writer = DirectoryWriter(memoryview(self.memory), num_slots)
        self.view = Directory(memoryview(self.memory), num_slots)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 99), st.integers(0, SLOTS - 1), st.integers(0, 2**64 - 1))))
def test_it_tells_what_was_listed_last_and_no_more(
    steps: list[tuple[bool, int, int, int]],
) -> None:
    """99 keys for 64 slots: buckets overflow, and a block that is not listed is one that the node is asked for."""
    table, keys = Table(), chain(1, 100)
    model: dict[BlockKey, tuple[int, int]] = {}
    for listed, number, slot, checksum in steps:
        if listed:
            table.writer.put(keys[number], slot, checksum)
            model[keys[number]] = slot, checksum
        else:
            table.writer.remove([keys[number]])
            model.pop(keys[number], None)
    found = {key: pair for key in keys for pair in zip(*table.view.find([key]), strict=True)}
    assert found.items() <= model.items()
    if len(model) <= 8:
        assert found == model


@pytest.mark.parametrize("length", [1, 8, 9, 60], ids=str)
def test_the_leading_run_is_found_however_long_it_is(length: int) -> None:
    """Few keys are looked up one by one, many as arrays: both ways give the same."""
    table, keys = Table(1024), chain(1, 60)
    for slot, key in enumerate(keys[:length]):
        table.writer.put(key, slot, 2**64 - 1 - slot)
    expected = list(range(length)), [2**64 - 1 - slot for slot in range(length)]
    assert table.view.find(keys[:length]) == table.view.find(keys) == expected
    table.writer.remove([keys[length // 2]])
    assert len(table.view.find(keys)[0]) == length // 2
    assert table.view.find(chain(2, length)) == ([], [])


def entries(table: Table) -> list[int]:
    """Where those stand that are in use."""
    return [at for at in range(0, len(table.memory), ENTRY_BYTES) if any(table.memory[at : at + ENTRY_BYTES])]


@pytest.mark.parametrize("as_arrays", [False, True])
@settings(max_examples=200)
@given(data=st.data())
def test_an_entry_that_is_half_another_is_not_there(as_arrays: bool, data: st.DataObject) -> None:
    """Whatever words of two entries a reader sees: it takes the one, the other, or none."""
    table, old, new = Table(), chain(3, 1)[0], chain(4, 1)[0]
    table.writer.put(old, data.draw(st.integers(0, SLOTS - 1)), data.draw(st.integers(0, 2**64 - 1)))
    (at,) = entries(table)
    before = struct.unpack_from("=5Q", table.memory, at)
    other = Table()
    other.writer.put(new, data.draw(st.integers(0, SLOTS - 1)), data.draw(st.integers(0, 2**64 - 1)))
    after = struct.unpack_from("=5Q", other.memory, entries(other)[0])
    mixed = [pair[data.draw(st.integers(0, 1))] for pair in zip(before, after, strict=True)]
    struct.pack_into("=5Q", table.memory, at, *mixed)
    for key, words in ((old, before), (new, after)):
        slots, checksums = table.view.find([key] * 9 if as_arrays else [key])
        if slots:
            assert mixed == list(words)
            assert (slots[0], checksums[0]) == (words[3], words[2])


@pytest.mark.parametrize("length", [1, 9])
def test_a_slot_that_there_is_not_is_not_told(length: int) -> None:
    table, keys = Table(1024), chain(5, length)
    for key in keys:
        table.writer.put(key, 1024, 1)
    assert table.view.find(keys) == ([], [])


@pytest.mark.parametrize("spoil", [lambda data, at: data[at] ^ 1, lambda data, at: 0xFF, lambda data, at: 0])
def test_garbage_is_nothing(spoil: Callable[[bytearray, int], int]) -> None:
    table, keys = Table(), chain(6, 8)
    for slot, key in enumerate(keys):
        table.writer.put(key, slot, 7)
    for at in range(len(table.memory)):
        table.memory[at] = spoil(table.memory, at)
    assert table.view.find(keys) == ([], [])
