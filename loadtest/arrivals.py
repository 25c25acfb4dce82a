"""When requests arrive: endless streams of times in seconds, given a mean rate and a source of randomness."""

from __future__ import annotations

import random
from collections.abc import Iterator


def poisson(rate_rps: float, rng: random.Random) -> Iterator[float]:
    """Independent arrivals: exponential gaps."""
    return gamma(rate_rps, 1.0, rng)


def gamma(rate_rps: float, cv: float, rng: random.Random) -> Iterator[float]:
    """Gaps of a gamma distribution with this coefficient of variation: 1 is Poisson, 2-4 comes in bursts.

    Raises ValueError unless both are positive.
    """
    if rate_rps <= 0 or cv <= 0:
        raise ValueError(f"rate and coefficient of variation must be positive, not {rate_rps} and {cv}")
    shape = cv**-2
    at_s = 0.0
    while True:
        at_s += rng.gammavariate(shape, 1 / (rate_rps * shape))
        yield at_s
