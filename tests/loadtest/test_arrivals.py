"""Arrivals have the mean rate that was asked for, and come in bursts as their coefficient of variation says."""

from __future__ import annotations

import itertools
import random
import statistics
from itertools import pairwise

import pytest

from loadtest.arrivals import gamma, poisson


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_rate_and_variation(cv: float) -> None:
    times = list(itertools.islice(gamma(4.0, cv, random.Random(1)), 20_000))
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert min(gaps) >= 0
    assert len(times) / times[-1] == pytest.approx(4.0, rel=0.1)
    assert statistics.stdev(gaps) / statistics.fmean(gaps) == pytest.approx(cv, rel=0.1)


def test_poisson_counts_vary_as_their_mean() -> None:
    times = itertools.takewhile(lambda at_s: at_s < 2_000, poisson(5.0, random.Random(2)))
    counts = [0] * 2_000
    for at_s in times:
        counts[int(at_s)] += 1
    assert statistics.variance(counts) / statistics.fmean(counts) == pytest.approx(1.0, rel=0.15)


@pytest.mark.parametrize(("rate_rps", "cv"), [(0.0, 1.0), (-1.0, 1.0), (1.0, 0.0)])
def test_nonsense_is_refused(rate_rps: float, cv: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        next(gamma(rate_rps, cv, random.Random(1)))
