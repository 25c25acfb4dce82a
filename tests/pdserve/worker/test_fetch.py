"""The cut between fetching and computing is where the measured rates say that most time is saved; never a worse one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.store.rates import PRIORS, WINDOW
from kvstore.store.tier import Tier
from pdserve.worker.fetch import GRACE_S, FetchPlanner

BLOCK_SIZE, BLOCK_BYTES = 16, 1 << 20
tiers = st.lists(st.sampled_from(Tier), max_size=40)


def planner(tokens_per_s: float = 1000.0, **bytes_per_s: float) -> FetchPlanner:
    made = FetchPlanner(BLOCK_SIZE, BLOCK_BYTES)
    for _ in range(WINDOW):
        made.computed(512, 512 / tokens_per_s)
        for name, rate in bytes_per_s.items():
            tier = Tier[name]
            made.fetched([tier] * 4, PRIORS[tier].latency_s + 4 * BLOCK_BYTES / rate)
    return made


def test_fast_tier_is_fetched_whole() -> None:
    plan = planner(HOST=4e9).plan([Tier.HOST] * 10)
    assert plan.num_blocks == 10
    fetch_s = PRIORS[Tier.HOST].latency_s + 10 * BLOCK_BYTES / 4e9
    assert plan.deadline_s == pytest.approx(min(10 * BLOCK_SIZE / 1000, GRACE_S + 4 * fetch_s))


def test_nothing_is_fetched_that_is_computed_sooner() -> None:
    assert planner(tokens_per_s=1e6, REMOTE=1e8).plan([Tier.REMOTE] * 10).num_blocks == 0


def test_few_blocks_are_not_worth_a_tiers_latency() -> None:
    quick = planner(tokens_per_s=4000.0, REMOTE=1e9)
    assert quick.plan([Tier.REMOTE] * 2).num_blocks == 0
    assert quick.plan([Tier.REMOTE] * 40).num_blocks == 40


def test_run_is_cut_where_a_slow_tier_begins() -> None:
    run = [Tier.HOST] * 5 + [Tier.REMOTE] * 5
    assert planner(tokens_per_s=20_000.0, HOST=4e9, REMOTE=1e8).plan(run).num_blocks == 5


def test_slow_block_is_fetched_when_what_lies_behind_it_pays() -> None:
    run = [Tier.REMOTE, *[Tier.HOST] * 9]
    assert planner(tokens_per_s=2_000.0, HOST=4e9, REMOTE=1e8).plan(run).num_blocks == 10


def test_an_outlier_changes_nothing() -> None:
    steady = planner(HOST=4e9)
    before = steady.plan([Tier.HOST] * 10)
    steady.fetched([Tier.HOST] * 4, 60.0)
    steady.computed(512, 60.0)
    assert steady.plan([Tier.HOST] * 10) == before


def test_small_measurements_say_nothing() -> None:
    steady = planner()
    before = steady.plan([Tier.HOST] * 10)
    for _ in range(WINDOW):
        steady.computed(1, 1.0)
        steady.fetched([], 1.0)
    assert steady.plan([Tier.HOST] * 10) == before


@given(tiers, st.floats(10, 1e6), st.floats(1e6, 1e11), st.floats(1e6, 1e11))
def test_plan_saves_time_and_waits_no_longer_than_computing_takes(
    run: list[Tier], tokens_per_s: float, host: float, remote: float
) -> None:
    plan = planner(tokens_per_s, HOST=host, REMOTE=remote).plan(run)
    assert 0 <= plan.num_blocks <= len(run)
    compute_s = plan.num_blocks * BLOCK_SIZE / tokens_per_s
    assert 0 <= plan.deadline_s <= compute_s * (1 + 1e-9)
