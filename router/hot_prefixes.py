"""Which prefixes are asked for more than those who hold them can serve, and who had better get a copy. Pure.

A prefix's load is the time that requests which begin with it take of a worker that holds it, a second: at 1 one holder
has nothing else to do. Above `ALARM` for each of its holders it is copied to one more worker, before requests would
have to wait, or another worker would have to compute it. Prefixes are told apart at the ends of groups of blocks
(`kvstore.keys.landmarks`); of those on one chain the longest that is hot is copied.

Bounded: `PREFIXES` are remembered, those with the least load go first; `budget_bytes` are copied in `window_s`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kvstore.keys import GROUP_BLOCKS, BlockKey

ALARM = 0.5
HALF_LIFE_S = 10.0
PREFIXES = 4096
AGAIN_S = 10.0  # a copy takes a moment to be seen: until then there is no second one
_RATE = math.log(2.0) / HALF_LIFE_S  # of a sum that halves each half-life, per second


@dataclass(slots=True)
class _Prefix:
    sum_s: float = 0.0  # seconds of work, true at `at_s`
    at_s: float = 0.0
    copied_s: float = -math.inf

    def load(self, now_s: float) -> float:
        return self.sum_s * math.exp2((self.at_s - now_s) / HALF_LIFE_S) * _RATE


@dataclass(frozen=True, slots=True)
class Hot:
    key: BlockKey
    blocks: int
    load: float


@dataclass(frozen=True, slots=True)
class Target:
    """A worker that may get a copy. `reach_blocks`: leading blocks of the request that its store holds."""

    worker_id: str
    slot: int
    reach_blocks: int
    busy_s: float


@dataclass(frozen=True, slots=True)
class Copy:
    worker_id: str
    blocks: int  # leading ones of the request
    num_bytes: int
    load: float  # of the prefix


class HotPrefixes:
    """
    Attributes:
        copies, copied_bytes: since the start.
    """

    def __init__(self, budget_bytes: int, window_s: float) -> None:
        self.copies = 0
        self.copied_bytes = 0
        self._budget_bytes = budget_bytes
        self._window_s = window_s
        self._prefixes: dict[BlockKey, _Prefix] = {}
        self._spent: deque[tuple[float, int]] = deque()  # of the last window

    def __len__(self) -> int:
        return len(self._prefixes)

    def note(self, keys: Sequence[BlockKey], work_s: float, now_s: float) -> list[Hot]:
        """A request that begins with these blocks, and keeps a worker that holds its prefix busy for `work_s`.

        Returns its prefixes that are hot for one holder, longest first.
        """
        hot: list[Hot] = []
        for blocks in range(GROUP_BLOCKS, len(keys) + 1, GROUP_BLOCKS):
            key = keys[blocks - 1]
            prefix = self._prefixes.get(key)
            if prefix is None:
                prefix = self._prefixes[key] = _Prefix(at_s=now_s)
            prefix.sum_s = prefix.sum_s * math.exp2((prefix.at_s - now_s) / HALF_LIFE_S) + work_s
            prefix.at_s = now_s
            if (load := prefix.sum_s * _RATE) >= ALARM:
                hot.append(Hot(key, blocks, load))
        if len(self._prefixes) > PREFIXES:
            self._forget(now_s)
        return hot[::-1]

    def choose(
        self, hot: Iterable[Hot], held: Mapping[int, int], targets: Sequence[Target], block_bytes: int, now_s: float
    ) -> Copy | None:
        """Who gets a copy of which prefix now; counts as made. `held`: leading blocks by slot that workers hold."""
        for each in hot:
            holders = sum(blocks >= each.blocks for blocks in held.values())
            prefix = self._prefixes.get(each.key)
            if prefix is None or each.load < ALARM * max(1, holders):
                continue  # None: hotter ones fill all the places
            if now_s < prefix.copied_s + AGAIN_S:
                return None  # the copy under way is one of the shorter ones' too
            fitting = [
                target
                for target in targets
                if held.get(target.slot, 0) < each.blocks <= target.reach_blocks
                and (each.blocks - held.get(target.slot, 0)) * block_bytes <= self._left_bytes(now_s)
            ]
            if not fitting:
                continue
            target = min(fitting, key=lambda one: (one.busy_s, one.worker_id))
            num_bytes = (each.blocks - held.get(target.slot, 0)) * block_bytes
            prefix.copied_s = now_s
            self._spent.append((now_s, num_bytes))
            self.copies += 1
            self.copied_bytes += num_bytes
            return Copy(target.worker_id, each.blocks, num_bytes, each.load)
        return None

    def _left_bytes(self, now_s: float) -> int:
        while self._spent and self._spent[0][0] <= now_s - self._window_s:
            self._spent.popleft()
        return self._budget_bytes - sum(num_bytes for _, num_bytes in self._spent)

    def _forget(self, now_s: float) -> None:
        """A quarter goes at a time, so that this is seldom."""
        by_load = sorted(self._prefixes.items(), key=lambda pair: -pair[1].load(now_s))
        self._prefixes = dict(by_load[: PREFIXES * 3 // 4])
