"""The search ends, finds the true limit within its resolution, and trusts no rate above one that failed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.search import RESOLUTION, highest_held, next_rate


def search(limit_rps: float, first_rps: float, max_points: int) -> dict[float, bool]:
    tried: dict[float, bool] = {}
    while (rate := next_rate(tried, first_rps, max_points)) is not None:
        assert rate not in tried
        tried[rate] = rate <= limit_rps
    return tried


@given(limit_rps=st.floats(0.2, 50.0), first_rps=st.floats(0.2, 50.0))
def test_finds_the_limit_within_its_resolution(limit_rps: float, first_rps: float) -> None:
    best = highest_held(search(limit_rps, first_rps, max_points=100))
    assert best is not None
    assert best <= limit_rps <= best * RESOLUTION * (1 + 1e-9)


@given(limit_rps=st.floats(0.0, 100.0), max_points=st.integers(1, 8))
def test_tries_no_more_than_allowed(limit_rps: float, max_points: int) -> None:
    assert 1 <= len(search(limit_rps, 1.0, max_points)) <= max_points


def test_the_ladder_is_the_same_for_all() -> None:
    assert list(search(5.0, 1.0, 10))[:4] == [1.0, 2.0, 4.0, 8.0]
    assert list(search(3.0, 1.0, 10))[:3] == [1.0, 2.0, 4.0]


@pytest.mark.parametrize(
    ("tried", "best"),
    [
        ({}, None),
        ({1.0: False}, None),
        ({1.0: True, 2.0: True}, 2.0),
        ({1.0: True, 2.0: False, 4.0: True}, 1.0),
    ],
)
def test_a_rate_above_a_failure_is_luck(tried: dict[float, bool], best: float | None) -> None:
    assert highest_held(tried) == best
