"""A circuit breaker: after failures, leave the broken thing alone for a while, then try once. Pure.

CLOSED ── too many failures in a row ──> OPEN ── pause over ──> HALF_OPEN ── success ──> CLOSED
                                          ^                         └── failure, pause doubled ──> OPEN
"""

from __future__ import annotations

from enum import Enum


class BreakerState(Enum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class Breaker:
    """Times in seconds on the caller's monotonic clock."""

    def __init__(self, max_failures: int, pause_s: float, max_pause_s: float) -> None:
        self.state = BreakerState.CLOSED
        self._max_failures = max_failures
        self._first_pause_s = pause_s
        self._max_pause_s = max_pause_s
        self._pause_s = pause_s
        self._failures = 0
        self._until_s = 0.0

    def allows(self, now_s: float) -> bool:
        """Whether to try now. In HALF_OPEN one caller is let through; the others wait for how it goes."""
        if self.state is BreakerState.CLOSED:
            return True
        if self.state is BreakerState.OPEN and now_s >= self._until_s:
            self.state = BreakerState.HALF_OPEN
            self._until_s = now_s + self._pause_s  # should the one that was let through never tell
            return True
        if self.state is BreakerState.HALF_OPEN and now_s >= self._until_s:
            self._until_s = now_s + self._pause_s
            return True
        return False

    def is_open(self, now_s: float) -> bool:
        """Whether `allows` would say no; changes nothing."""
        return self.state is not BreakerState.CLOSED and now_s < self._until_s

    def succeeded(self) -> None:
        self.state = BreakerState.CLOSED
        self._failures = 0
        self._pause_s = self._first_pause_s

    def failed(self, now_s: float) -> None:
        self._failures += 1
        if self.state is BreakerState.HALF_OPEN:
            self._pause_s = min(2 * self._pause_s, self._max_pause_s)
        elif self._failures < self._max_failures:
            return
        self.state = BreakerState.OPEN
        self._until_s = now_s + self._pause_s
