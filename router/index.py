"""Which worker holds which block: block key -> integer bit set over worker slots, fed by the workers' KV events.

A look-up is one dictionary access and a few integer operations a group of blocks, and a few more for each group in
which workers part ways, however many workers there are. The reverse map (keys by slot) lets a worker's contents be
replaced or forgotten without a walk over everyone else's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from kvstore.keys import GROUP_BLOCKS, KEY_BYTES, BlockKey


def split_keys(data: bytes) -> list[BlockKey]:
    """Keys of a KV event's concatenation.

    Raises:
        ValueError: not a whole number of keys.
    """
    if len(data) % KEY_BYTES:
        raise ValueError(f"{len(data)} bytes are no concatenation of {KEY_BYTES}-byte keys")
    return [BlockKey(data[start : start + KEY_BYTES]) for start in range(0, len(data), KEY_BYTES)]


class PrefixIndex:
    """Block keys by worker slot. Slots are small integers that the fleet hands out and reuses."""

    def __init__(self) -> None:
        self._holders: dict[BlockKey, int] = {}
        self._held: dict[int, set[BlockKey]] = {}  # by slot; bounded by the caller through `count`

    def __len__(self) -> int:
        """Distinct keys."""
        return len(self._holders)

    def count(self, slot: int) -> int:
        """Blocks that the worker in `slot` holds."""
        return len(self._held.get(slot, ()))

    def stored(self, slot: int, keys: Iterable[BlockKey]) -> None:
        bit = 1 << slot
        holders, held = self._holders, self._held.setdefault(slot, set())
        for key in keys:
            holders[key] = holders.get(key, 0) | bit
            held.add(key)

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
        for key in self._held.pop(slot, ()):
            self._clear(key, 1 << slot)

    def match(self, keys: Sequence[BlockKey]) -> Mapping[int, int]:
        """How many leading blocks of `keys` each worker holds, by slot; slots with none are left out.

        Looks at the last key of each group of `keys` and searches by halves only the groups where workers drop out, so
        that a `KeyChain` derives few keys. This takes a worker to hold what lies before a block that it holds: pools
        evict children first, and a worker that says otherwise is routed to in vain, nothing worse.
        """
        depths: dict[int, int] = {}
        if not keys:
            return depths
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
                self._note_drops(depths, keys, begin, end, alive, holders)
                alive = holders
            begin = end
        _note(depths, alive, length)
        return depths

    def _note_drops(
        self, depths: dict[int, int], keys: Sequence[BlockKey], begin: int, end: int, before: int, after: int
    ) -> None:
        """Of the workers `before` that hold `begin` blocks, those not in `after` hold fewer than `end`."""
        if end - begin == 1:
            _note(depths, before ^ after, begin)
            return
        middle = (begin + end) // 2
        between = after | before & self._holders.get(keys[middle - 1], 0)
        if between != before:
            self._note_drops(depths, keys, begin, middle, before, between)
        if between != after:
            self._note_drops(depths, keys, middle, end, between, after)

    def _clear(self, key: BlockKey, bit: int) -> None:
        left = self._holders[key] & ~bit
        if left:
            self._holders[key] = left
        else:
            del self._holders[key]


def _note(depths: dict[int, int], slots: int, depth: int) -> None:
    """`depths[slot] = depth` for each bit of `slots`."""
    while slots:
        lowest = slots & -slots
        depths[lowest.bit_length() - 1] = depth
        slots ^= lowest
