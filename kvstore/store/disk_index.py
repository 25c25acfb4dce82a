"""Which block is in which record of which segment: a dict and a few columns. Pure.

    row = seat * records_per_segment + record          a segment sits on one of `num_seats` seats while it exists

Every block whose parent was on disk when it came knows the parent's row, so a segment that goes takes along what
followed its blocks in other segments: what is on disk can be reached from the beginning of its chain.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from kvstore.keys import KEY_BYTES, BlockKey
from kvstore.store.segment import TENANT_BYTES, Headers
from kvstore.store.wire import NO_PARENT, split_all


class DiskIndex:
    """Not thread-safe. 16 bytes a key, 16 a parent and 14 more in columns, besides the dict."""

    def __init__(self, num_seats: int, records_per_segment: int) -> None:
        self.records_per_segment = records_per_segment
        rows = num_seats * records_per_segment
        self._rows: dict[BlockKey, int] = {}
        # Untouched pages of these cost nothing.
        self._keys = np.zeros((rows, KEY_BYTES), np.uint8)
        self._parents = np.zeros((rows, KEY_BYTES), np.uint8)
        self._parent_rows = np.full(rows, -1, np.int32)
        self._tenants = np.zeros(rows, np.uint16)
        self._live = np.zeros(rows, np.bool_)
        self._used = np.zeros(num_seats, np.int64)  # tick of the last use; 0: free
        self._tenant_numbers: dict[bytes, int] = {b"": 0}
        self._tenant_blocks: dict[int, int] = {}
        self._tick = 0

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[BlockKey]:
        return iter(self._rows)

    def find(self, key: BlockKey) -> tuple[int, int] | None:
        """Seat and record."""
        row = self._rows.get(key)
        return None if row is None else divmod(row, self.records_per_segment)

    def parent(self, key: BlockKey) -> BlockKey | None:
        row = self._rows.get(key)
        parent = NO_PARENT if row is None else self._parents[row].tobytes()
        return None if parent == NO_PARENT else BlockKey(parent)

    def tenant(self, key: BlockKey) -> bytes:
        row = self._rows.get(key)
        return b"" if row is None else list(self._tenant_numbers)[self._tenants[row]]

    def tenant_blocks(self, tenant: bytes) -> int:
        return self._tenant_blocks.get(self._tenant_numbers.get(tenant, -1), 0)

    def touch(self, keys: Iterable[BlockKey]) -> None:
        """Note a use of their segments."""
        self._tick += 1
        rows, size, used, tick = self._rows, self.records_per_segment, self._used, self._tick
        for seat in {row // size for key in keys if (row := rows.get(key)) is not None}:
            used[seat] = tick

    def seat(self, seat: int) -> None:
        """A segment sits there from now on, used just now."""
        self._tick += 1
        self._used[seat] = self._tick

    def put(self, seat: int, record: int, key: BlockKey, parent: BlockKey | None, tenant: bytes) -> None:
        """A block has been written. One that is here already is replaced."""
        row = seat * self.records_per_segment + record
        self._forget(key)
        self._rows[key] = row
        self._keys[row] = np.frombuffer(key, np.uint8)
        self._parents[row] = np.frombuffer(parent or NO_PARENT, np.uint8)
        self._parent_rows[row] = -1 if parent is None else self._rows.get(parent, -1)
        number = self._tenant_numbers.setdefault(tenant, len(self._tenant_numbers))
        self._tenants[row] = number
        self._tenant_blocks[number] = self._tenant_blocks.get(number, 0) + 1
        self._live[row] = True

    def put_all(self, seat: int, records: NDArray[np.int64], headers: Headers) -> None:
        """The blocks of a segment that was found at the start; `link` is due when all are in."""
        rows = seat * self.records_per_segment + records
        data = np.ascontiguousarray(headers["key"]).tobytes()
        keys = split_all(data)
        for key in [key for key in keys if key in self._rows]:
            self._forget(key)
        before = len(self._rows)
        self._rows.update(zip(keys, rows.tolist(), strict=True))
        self._keys[rows] = np.frombuffer(data, np.uint8).reshape(-1, KEY_BYTES)
        parents = np.ascontiguousarray(headers["parent"]).tobytes()
        self._parents[rows] = np.frombuffer(parents, np.uint8).reshape(-1, KEY_BYTES)
        names, inverse, counts = np.unique(headers["tenant"], return_inverse=True, return_counts=True)
        numbers = np.array(
            [self._tenant_numbers.setdefault(bytes(name)[:TENANT_BYTES], len(self._tenant_numbers)) for name in names],
            np.uint16,
        )
        self._tenants[rows] = numbers[inverse]
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            self._tenant_blocks[number] = self._tenant_blocks.get(number, 0) + count
        self._live[rows] = True
        # Of a key that is twice in one segment the later one counts.
        if len(self._rows) - before < len(keys):
            for key, row in zip(keys, rows.tolist(), strict=True):
                if self._rows[key] != row:
                    self._kill(row)

    def link(self) -> None:
        """Find the rows of all parents. A block whose parent is not here follows it: no look-up would reach it."""
        rows = np.flatnonzero(self._live)
        parents, get = split_all(self._parents[rows].tobytes()), self._rows.get
        self._parent_rows[rows] = [get(parent, -1) for parent in parents]
        self._drop(self._live & self._parents.any(axis=1) & (self._parent_rows < 0))

    def is_empty(self, seat: int) -> bool:
        """No block is found there."""
        first = seat * self.records_per_segment
        return not self._live[first : first + self.records_per_segment].any()

    def coldest(self, seats: Iterable[int]) -> int | None:
        """The seat used least recently."""
        return min(seats, key=lambda seat: int(self._used[seat]), default=None)

    def clear_seat(self, seat: int) -> list[BlockKey]:
        """A segment goes: its keys and those of all blocks that follow them, which are no longer found."""
        first = seat * self.records_per_segment
        doomed = np.zeros_like(self._live)
        doomed[first : first + self.records_per_segment] = self._live[first : first + self.records_per_segment]
        self._used[seat] = 0
        return self._drop(doomed)

    def drop(self, keys: Iterable[BlockKey]) -> list[BlockKey]:
        """These and all that follow them are no longer found."""
        doomed = np.zeros_like(self._live)
        for key in keys:
            if (row := self._rows.get(key)) is not None:
                doomed[row] = True
        return self._drop(doomed) if doomed.any() else []

    def _drop(self, doomed: NDArray[np.bool_]) -> list[BlockKey]:
        """Doomed rows and their descendants: each round looks twice as far up the chains."""
        up = self._parent_rows.copy()
        for _ in range(32):  # enough for all rows in one chain; parents that go in a circle must not hold us up
            below = np.flatnonzero(up >= 0)
            if not below.size:
                break
            above = up[below]
            doomed[below] |= doomed[above]
            up[below] = up[above]
        rows = np.flatnonzero(doomed & self._live)
        gone = split_all(self._keys[rows].tobytes())
        for key, row in zip(gone, rows.tolist(), strict=True):
            del self._rows[key]
            self._kill(row)
        return gone

    def _forget(self, key: BlockKey) -> None:
        row = self._rows.pop(key, None)
        if row is not None:
            self._kill(row)

    def _kill(self, row: int) -> None:
        self._live[row] = False
        self._parent_rows[row] = -1
        self._tenant_blocks[int(self._tenants[row])] -= 1
