"""Which worker holds which block: block key -> integer bit set over worker slots, fed by the workers' KV events.

A look-up is one dictionary access and a few integer operations a group of blocks, and a few more for each group in
which workers part ways, however many workers there are. The reverse map (keys by slot) lets a worker's contents be
replaced or forgotten without a walk over everyone else's.

What a worker was sent counts as held before its own event says so, for a while (`expect`): requests that share a new
prefix and come together would otherwise each find it nowhere. `kvstore.keys.landmarks` are enough for that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from kvstore.keys import GROUP_BLOCKS, KEY_BYTES, BlockKey

_FEW = 8  # slots that are set one by one in a column: sooner than all at once
MAX_EXPECTED = 1 << 17  # keys of one worker that may be expected; what is more is not


def split_keys(data: bytes) -> list[BlockKey]:
    """Keys of a KV event's concatenation.

    Raises:
        ValueError: not a whole number of keys.
    """
    if len(data) % KEY_BYTES:
        raise ValueError(f"{len(data)} bytes are no concatenation of {KEY_BYTES}-byte keys")
    return [BlockKey(data[start : start + KEY_BYTES]) for start in range(0, len(data), KEY_BYTES)]


class Match:
    """How many leading blocks of a request each worker holds."""

    __slots__ = ("_runs",)

    def __init__(self, runs: list[tuple[int, int]]) -> None:
        """`runs`: bit sets of slots, without overlap, each with its number of blocks."""
        self._runs = runs

    def of(self, slot: int) -> int:
        return next((blocks for slots, blocks in self._runs if slots >> slot & 1), 0)

    def by_slot(self) -> dict[int, int]:
        """Slots with none are left out."""
        found: dict[int, int] = {}
        for held, blocks in self._runs:
            while held:
                slot = held.bit_length() - 1
                found[slot] = blocks
                held ^= 1 << slot
        return found

    def column(self, slots: int) -> NDArray[np.float64]:
        """For each slot below `slots`, which is a multiple of 8 and above all that hold something."""
        column = np.zeros(slots)
        for held, blocks in self._runs:
            left = held.bit_count()
            if left > _FEW:
                packed = np.frombuffer(held.to_bytes(slots // 8, "little"), np.uint8)
                column[np.unpackbits(packed, bitorder="little").view(np.bool_)] = blocks
                continue
            column[held.bit_length() - 1] = blocks
            while left > 1:
                held ^= 1 << held.bit_length() - 1
                column[held.bit_length() - 1] = blocks
                left -= 1
        return column


class PrefixIndex:
    """Block keys by worker slot. Slots are small integers that the fleet hands out and reuses."""

    def __init__(self) -> None:
        self._holders: dict[BlockKey, int] = {}
        self._held: dict[int, set[BlockKey]] = {}  # by slot; bounded by the caller through `count`
        # By slot, keys that it does not hold yet with the time at which they stop to count. Disjoint from `_held`.
        self._expected: dict[int, dict[BlockKey, float]] = {}
        self._expiries: deque[tuple[float, int, list[BlockKey]]] = deque()  # ascending

    def __len__(self) -> int:
        """Distinct keys, those that are only expected included."""
        return len(self._holders)

    def count(self, slot: int) -> int:
        """Blocks that the worker in `slot` holds."""
        return len(self._held.get(slot, ()))

    def count_expected(self, slot: int) -> int:
        """Blocks that it is only expected to hold."""
        return len(self._expected.get(slot, ()))

    def stored(self, slot: int, keys: Iterable[BlockKey]) -> None:
        bit = 1 << slot
        holders, held = self._holders, self._held.setdefault(slot, set())
        expected = self._expected.get(slot)
        get, add = holders.get, held.add
        for key in keys:
            holders[key] = get(key, 0) | bit
            add(key)
            if expected:
                expected.pop(key, None)

    def removed(self, slot: int, keys: Iterable[BlockKey]) -> None:
        """Keys that the worker does not hold are ignored."""
        held = self._held.get(slot)
        if held is None:
            return
        for key in keys:
            if key in held:
                held.remove(key)
                self._clear(key, 1 << slot)

    def snapshot(self, slot: int, keys: Iterable[BlockKey]) -> None:
        """The worker in `slot` holds exactly `keys`."""
        self.remove_worker(slot)
        self.stored(slot, keys)

    def remove_worker(self, slot: int) -> None:
        for keys in (self._held.pop(slot, ()), self._expected.pop(slot, ())):
            for key in keys:
                self._clear(key, 1 << slot)

    def expect(self, slot: int, keys: Iterable[BlockKey], now_s: float, expires_s: float) -> None:
        """Until `expires_s` the worker counts as holding `keys`, unless its events say so themselves before."""
        self.expire(now_s)
        if slot not in self._held:
            return  # it has said nothing yet, or left
        held, expected = self._held[slot], self._expected.setdefault(slot, {})
        fresh = [key for key in keys if key not in held][: MAX_EXPECTED - len(expected)]
        if not fresh:
            return
        if self._expiries:
            expires_s = max(expires_s, self._expiries[-1][0])  # so that the queue ascends
        for key in fresh:
            self._holders[key] = self._holders.get(key, 0) | 1 << slot
            expected[key] = expires_s
        self._expiries.append((expires_s, slot, fresh))

    def expire(self, now_s: float) -> None:
        """Forget what was expected and did not come in time."""
        while self._expiries and self._expiries[0][0] <= now_s:
            expires_s, slot, keys = self._expiries.popleft()
            expected = self._expected.get(slot, {})
            for key in keys:
                if expected.get(key) == expires_s:  # else it came, went, or is expected until later
                    del expected[key]
                    self._clear(key, 1 << slot)

    def match(self, keys: Sequence[BlockKey]) -> Match:
        """How many leading blocks of `keys` each worker holds or is expected to hold.

        Looks at the last key of each group of `keys` and searches by halves only the groups where workers drop out, so
        that a `KeyChain` derives few keys. This takes a worker to hold what lies before a block that it holds: pools
        evict children first, and a worker that says otherwise is routed to in vain, nothing worse.
        """
        runs: list[tuple[int, int]] = []
        if not keys:
            return Match(runs)
        get, length = self._holders.get, len(keys)
        alive = get(keys[0], 0)
        begin = 1  # blocks that all of `alive` hold
        for end in (*range(GROUP_BLOCKS, length, GROUP_BLOCKS), length):
            if not alive:
                break
            if end <= begin:
                continue
            holders = alive & get(keys[end - 1], 0)
            if holders != alive:
                self._note_drops(runs, keys, begin, end, alive ^ holders)
                alive = holders
            begin = end
        if alive:
            runs.append((alive, length))
        return Match(runs)

    def _note_drops(
        self, runs: list[tuple[int, int]], keys: Sequence[BlockKey], begin: int, end: int, gone: int
    ) -> None:
        """The workers `gone` hold `begin` blocks and fewer than `end`."""
        get = self._holders.get
        while end - begin > 1:
            middle = (begin + end) // 2
            later = gone & get(keys[middle - 1], 0)
            if not later:
                end = middle
                continue
            if later != gone:
                self._note_drops(runs, keys, begin, middle, gone ^ later)
                gone = later
            begin = middle
        runs.append((gone, begin))

    def _clear(self, key: BlockKey, bit: int) -> None:
        left = self._holders[key] & ~bit
        if left:
            self._holders[key] = left
        else:
            del self._holders[key]
