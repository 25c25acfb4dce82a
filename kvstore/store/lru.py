"""Least recently used first, where being used must cost nothing but an assignment.

A member's `tick` is set when it is used. The heap keeps the tick that was current when the member was put in; one that
is met with an older tick than its own goes back in with the newer one. So a look-up of 2,000 blocks does no heap work,
and an eviction pays for what was touched since. Where others evict nobody meets anything: then what is dead is dropped
whenever it may be half of the heap.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

_LEAST = 64


class Ranked(Protocol):
    @property
    def key(self) -> bytes: ...

    @property
    def rank(self) -> tuple[int, int]:
        """Smallest goes first; only grows while the member is in the heap."""
        ...


R = TypeVar("R", bound=Ranked)


class LruHeap(Generic[R]):
    """Candidates for eviction. Members that stopped being candidates are dropped when they are met."""

    def __init__(self, is_candidate: Callable[[R], bool]) -> None:
        self._is_candidate = is_candidate
        self._heap: list[tuple[tuple[int, int], bytes, R]] = []
        self._members: dict[bytes, R] = {}
        self._prune_at = _LEAST

    def __len__(self) -> int:
        """Those included that stopped being candidates, and were not dropped yet."""
        return len(self._heap)

    def add(self, member: R) -> None:
        """Idempotent."""
        if self._members.get(member.key) is not member:
            self._members[member.key] = member
            heapq.heappush(self._heap, (member.rank, member.key, member))
            if len(self._heap) >= self._prune_at:
                self._prune()

    def peek(self) -> R | None:
        """The candidate that was used least recently; it stays in."""
        while self._heap:
            rank, key, member = self._heap[0]
            current = self._members.get(key) is member
            if current and self._is_candidate(member):
                if member.rank == rank:
                    return member
                heapq.heapreplace(self._heap, (member.rank, key, member))
                continue
            heapq.heappop(self._heap)
            if current:
                del self._members[key]
        return None

    def _prune(self) -> None:
        members, is_candidate = self._members, self._is_candidate
        self._heap = [entry for entry in self._heap if members.get(entry[1]) is entry[2] and is_candidate(entry[2])]
        heapq.heapify(self._heap)
        self._members = {key: member for _, key, member in self._heap}
        self._prune_at = max(_LEAST, 2 * len(self._heap))
