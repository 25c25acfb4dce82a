"""Load with memory: a sum in which everything counts half after each half-life."""

from __future__ import annotations

import math


class DecayingSum:
    """Time is passed in, in seconds on one clock, never decreasing."""

    def __init__(self, half_life_s: float) -> None:
        self._half_life_s = half_life_s
        self._value = 0.0
        self._at_s = 0.0

    def add(self, amount: float, now_s: float) -> None:
        self._value = self.value(now_s) + amount
        self._at_s = now_s

    def value(self, now_s: float) -> float:
        if self._value == 0.0:
            return 0.0
        return self._value * math.exp2((self._at_s - now_s) / self._half_life_s)
