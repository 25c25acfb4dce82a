"""Which rate to try next, and which is the highest that held. Pure.

Doubling until one fails, then halving the bracket in ratio: all targets climb the same ladder, so their points can be
compared rate by rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

# A bracket narrower than this is not resolved by some tens of requests a point.
RESOLUTION = 1.15


def highest_held(tried: Mapping[float, bool]) -> float | None:
    """The highest rate that held and is below all that did not: a rate above a failure held by luck."""
    failed = min((rate for rate, held in tried.items() if not held), default=math.inf)
    return max((rate for rate, held in tried.items() if held and rate < failed), default=None)


def next_rate(tried: Mapping[float, bool], first_rps: float, max_points: int) -> float | None:
    """None when the bracket is narrow enough or `max_points` were tried."""
    if not tried:
        return first_rps
    if len(tried) >= max_points:
        return None
    failed = min((rate for rate, held in tried.items() if not held), default=None)
    held = highest_held(tried)
    if failed is None:
        return max(tried) * 2
    if held is None:
        return failed / 2
    return None if failed / held <= RESOLUTION else math.sqrt(failed * held)
