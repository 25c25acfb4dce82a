"""KV events: what a node has stored, removed or cleared, numbered without gaps, for those who keep a picture of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from kvstore.keys import BlockKey
from kvstore.store.tier import Tier

MAX_WAITING = 4096  # events that one subscriber may be behind; then it is ended and subscribes again
MAX_SUBSCRIBERS = 64
_SNAPSHOT_KEYS = 4096  # of one event


class EventKind(Enum):
    STORED = 0
    REMOVED = 1
    CLEARED = 2  # everything in that tier
    SNAPSHOT_END = 3


@dataclass(frozen=True, slots=True)
class KvEvent:
    """`sequence` counts from 1 in one life of the node; those of a snapshot carry the number it is true at."""

    sequence: int
    kind: EventKind
    tier: Tier
    keys: tuple[BlockKey, ...] = ()


class Subscription:
    """Events in order. It ends when the subscriber is too slow, or the log is closed."""

    def __init__(self, log: EventLog, first: Sequence[KvEvent]) -> None:
        self._log = log
        self._waiting: asyncio.Queue[KvEvent | None] = asyncio.Queue()
        for event in first:
            self._waiting.put_nowait(event)
        self._ended = False

    def put(self, event: KvEvent) -> None:
        if self._waiting.qsize() >= MAX_WAITING:
            self.end()
        elif not self._ended:
            self._waiting.put_nowait(event)

    def end(self) -> None:
        if not self._ended:
            self._ended = True
            self._log.forget(self)
            self._waiting.put_nowait(None)

    async def next(self) -> KvEvent | None:
        """None at the end."""
        return await self._waiting.get()


class EventLog:
    def __init__(self) -> None:
        self.sequence = 0
        self._subscriptions: list[Subscription] = []

    def emit(self, kind: EventKind, tier: Tier, keys: Iterable[BlockKey]) -> None:
        """Tell all subscribers; nothing if there are no keys (but of CLEARED)."""
        told = tuple(keys)
        if not told and kind is not EventKind.CLEARED:
            return
        self.sequence += 1
        event = KvEvent(self.sequence, kind, tier, told)
        for subscription in tuple(self._subscriptions):
            subscription.put(event)

    def subscribe(self, held: dict[Tier, Sequence[BlockKey]]) -> Subscription | None:
        """A subscription that begins with everything that is `held` now; None if there are too many."""
        if len(self._subscriptions) >= MAX_SUBSCRIBERS:
            return None
        first = [
            KvEvent(self.sequence, EventKind.STORED, tier, tuple(keys[start : start + _SNAPSHOT_KEYS]))
            for tier, keys in held.items()
            for start in range(0, len(keys), _SNAPSHOT_KEYS)
        ]
        first.append(KvEvent(self.sequence, EventKind.SNAPSHOT_END, Tier.HOST))
        subscription = Subscription(self, first)
        self._subscriptions.append(subscription)
        return subscription

    def forget(self, subscription: Subscription) -> None:
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)

    def close(self) -> None:
        for subscription in tuple(self._subscriptions):
            subscription.end()
