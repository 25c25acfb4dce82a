"""What makes a request good, for server and load tests alike: it meets its TTFT and its TPOT (goodput as DistServe
defines it)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Slo:
    """Objectives of one request, in seconds; meeting one exactly is meeting it.

    Attributes:
        ttft_s: time to first token.
        tpot_s: mean time per output token after the first.
    """

    ttft_s: float
    tpot_s: float

    def meets_ttft(self, ttft_s: float | None) -> bool:
        """None: no token ever came."""
        return ttft_s is not None and ttft_s <= self.ttft_s

    def meets_tpot(self, tpot_s: float | None) -> bool:
        """None: there was one token only, so nothing that could be late."""
        return tpot_s is None or tpot_s <= self.tpot_s


def is_good(slo: Slo, ttft_s: float | None, tpot_s: float | None) -> bool:
    """Of a request that ended well; one that was rejected or failed is never good."""
    return slo.meets_ttft(ttft_s) and slo.meets_tpot(tpot_s)
