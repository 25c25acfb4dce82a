"""The last values of something, kept in order too, so that a quantile of them costs a look."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque


class Window:
    """At most `size` finite numbers; the oldest goes first."""

    __slots__ = ("_ordered", "_size", "_values")

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: deque[float] = deque()
        self._ordered: list[float] = []

    def __len__(self) -> int:
        return len(self._values)

    def add(self, value: float) -> None:
        if len(self._values) == self._size:
            del self._ordered[bisect_left(self._ordered, self._values.popleft())]
        self._values.append(value)
        insort(self._ordered, value)

    def drop_newest(self) -> None:
        """There is one."""
        del self._ordered[bisect_left(self._ordered, self._values.pop())]

    @property
    def median(self) -> float:
        """As `statistics.median`; there is a value."""
        ordered = self._ordered
        middle = len(ordered) // 2
        return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2

    def quantile(self, share: float) -> float:
        """The smallest value that more than this share of all lie below or at; there is a value."""
        return self._ordered[min(len(self._ordered) - 1, int(share * len(self._ordered)))]
