"""Shares are of all requests, the rejected and failed among them; percentiles and tails are of what was answered."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.live import Count
from loadtest.run import Run
from loadtest.statistics import mean_of_longest, means, percentile, spread, summarise
from tests.support.outcomes import SLO, answered, failed, point


def test_failed_requests_count_in_every_share() -> None:
    outcomes = [answered()] * 6 + [answered(ttft_s=2.0)] * 2 + [answered(tpot_s=0.2)] + [failed()]
    found = point(1.0, outcomes)
    assert (found.requests, found.failed) == (10, 1)
    assert found.good_share == 0.6
    assert (found.ttft_share, found.tpot_share) == (0.7, 0.8)
    assert found.goodput_rps == pytest.approx(0.6)
    assert found.errors == {"HTTP 503: busy": 1}


@pytest.mark.parametrize(("live", "share"), [(Count(8, 6), 0.75), (Count(0, 0), None), (None, None)])
def test_share_by_the_server_is_of_its_own_count(live: Count | None, share: float | None) -> None:
    run = Run((answered(), failed()), offered_s=1.0, elapsed_s=1.0, client_cpu_s=0.0)
    assert summarise(run, SLO, 1.0, live).server_good_share == share


def test_rates_tokens_and_cost() -> None:
    found = point(3.0, [answered(tokens=11)] * 4 + [failed()])
    assert (found.rate_rps, found.offered_rps) == (3.0, 0.5)
    assert (found.output_tokens, found.prompt_tokens, found.cached_tokens) == (44, 400, 100)
    assert found.output_tokens_per_s == pytest.approx(44 / 20)
    assert found.client_cores == pytest.approx(0.025)


def test_stages_are_means_and_sum_to_the_mean_ttft() -> None:
    found = point(1.0, [answered(ttft_s=0.4), answered(ttft_s=0.8), failed()])
    assert sum(found.stages_s.values()) == pytest.approx(found.ttft.mean_s) == pytest.approx(0.6)
    assert found.handoff_s == {"transfer": pytest.approx(0.01)}


def test_nothing_answered_is_nan_and_no_server() -> None:
    found = point(1.0, [failed()] * 3)
    assert found.good_share == 0.0
    assert found.server_good_share is None
    assert math.isnan(found.ttft.p50_s)
    assert math.isnan(found.longest_gaps_s)


def test_the_longest_tenth() -> None:
    assert mean_of_longest([*range(90), *[100.0] * 10]) == 100.0
    assert mean_of_longest([1.0, 2.0, 3.0]) == 3.0


@given(st.lists(st.floats(0, 1e6), min_size=1))
def test_spread_is_in_order_and_within_the_values(values: list[float]) -> None:
    found = spread(values)
    assert list(found.cdf_s) == sorted(found.cdf_s)
    assert (found.cdf_s[0], found.cdf_s[-1]) == (min(values), max(values))
    assert found.p50_s <= found.p90_s <= found.p99_s
    # Up to rounding of the sums.
    assert mean_of_longest(values) >= found.mean_s or mean_of_longest(values) == pytest.approx(found.mean_s)


def test_percentiles_are_nearest_rank() -> None:
    ordered = [float(number) for number in range(100)]
    assert [percentile(ordered, share) for share in (0.0, 0.5, 0.99, 1.0)] == [0.0, 50.0, 99.0, 99.0]


def test_a_stage_that_one_lacks_counts_as_none() -> None:
    assert means([{"a": 1.0}, {"a": 3.0, "b": 4.0}]) == {"a": 2.0, "b": 2.0}
