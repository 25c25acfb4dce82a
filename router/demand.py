"""What is asked of the fleet lately: requests a second, and the mean of what one needs. Pure: time is passed in."""

from __future__ import annotations

import math
from dataclasses import dataclass

HALF_LIFE_S = 60.0
_LEAST = 10.0  # requests that a mean is worth something from


@dataclass(frozen=True, slots=True)
class Demand:
    """Of one request: tokens to compute, tokens to generate, tokens of context; and what its class allows."""

    requests_per_s: float
    uncached_tokens: float
    output_tokens: float
    context_tokens: float
    ttft_s: float
    tpot_s: float


class DemandMeter:
    """Arrivals and needs, each counting half after each half-life."""

    def __init__(self) -> None:
        self._arrived = 0.0
        self._ended = 0.0
        self._sums = [0.0] * 5
        self._began_s: float | None = None
        self._decayed_s = 0.0

    def arrived(self, now_s: float) -> None:
        """Also one that is refused: it was asked for."""
        self._decay(now_s)
        self._arrived += 1.0

    def ended(
        self, now_s: float, uncached_tokens: int, output_tokens: int, context_tokens: int, ttft_s: float, tpot_s: float
    ) -> None:
        """A request was served; the last two are its objectives."""
        self._decay(now_s)
        self._ended += 1.0
        for at, value in enumerate((uncached_tokens, output_tokens, context_tokens, ttft_s, tpot_s)):
            self._sums[at] += value

    def now(self, now_s: float) -> Demand | None:
        """None before enough was seen, or long after."""
        self._decay(now_s)
        if self._ended < _LEAST or self._began_s is None:
            return None
        # Of a constant rate r, r * half_life / ln 2 * (1 - 2 ** -(time / half_life)) count after that time.
        seen = 1.0 - math.exp2((self._began_s - now_s) / HALF_LIFE_S)
        rate = self._arrived * math.log(2.0) / HALF_LIFE_S / max(seen, 1e-3)
        return Demand(rate, *(total / self._ended for total in self._sums))

    def _decay(self, now_s: float) -> None:
        if self._began_s is None:
            self._began_s = self._decayed_s = now_s
        share = math.exp2((self._decayed_s - now_s) / HALF_LIFE_S)
        self._arrived *= share
        self._ended *= share
        self._sums = [total * share for total in self._sums]
        self._decayed_s = now_s
