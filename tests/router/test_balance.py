"""Advice raises predicted goodput, waits until it is sure, and never flaps: under a virtual clock, followed at once."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.balance import (
    COOL_S,
    HOLD_S,
    LEAST_GAIN,
    Balancer,
    WorkerView,
    best_change,
    capacity_rps,
    decode_rps,
    goodput_rps,
    prefill_rps,
)
from router.demand import Demand, DemandMeter
from router.policy import Role
from router.step_model import StepModel

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED
LONG_PROMPTS = Demand(8.0, 4000.0, 50.0, 4025.0, 4.0, 0.25)
LONG_ANSWERS = Demand(8.0, 200.0, 1000.0, 700.0, 4.0, 0.25)


def fleet(*roles: Role) -> list[WorkerView]:
    step = StepModel(0.02, 0.001, 1e-7)
    return [
        WorkerView(f"w{n}", role, 10_000.0, step, max_sequences=64, pool_tokens=100_000, sequences=n)
        for n, role in enumerate(roles)
    ]


def test_capacity_is_that_of_the_scarcer_role() -> None:
    workers = fleet(P, P, D)
    prefill, decode = 2 * prefill_rps(workers[0], LONG_PROMPTS), decode_rps(workers[2], LONG_PROMPTS)
    assert capacity_rps(workers, LONG_PROMPTS) == min(prefill, decode)
    assert capacity_rps(fleet(P, P), LONG_PROMPTS) == 0.0
    # One prompt takes .4 s of 4 s: a little of the rate is given up to the wait; all of it when one is too slow.
    assert 0.9 * 2.5 < prefill_rps(workers[0], LONG_PROMPTS) < 2.5
    assert prefill_rps(workers[0], replace(LONG_PROMPTS, ttft_s=0.3)) == 0.0
    assert decode_rps(workers[0], replace(LONG_PROMPTS, tpot_s=0.01)) == 0.0


def test_a_mixed_worker_gives_its_time_to_what_is_scarce() -> None:
    assert capacity_rps(fleet(P, D, M), LONG_PROMPTS) > capacity_rps(fleet(P, D), LONG_PROMPTS)
    alone = capacity_rps(fleet(M), LONG_PROMPTS)
    one = fleet(M)[0]
    harmonic = 1 / (1 / prefill_rps(one, LONG_PROMPTS) + 1 / decode_rps(one, LONG_PROMPTS))
    assert alone == pytest.approx(harmonic, rel=1e-6)


def test_the_idlest_worker_of_the_role_that_is_not_scarce_changes() -> None:
    found = best_change(fleet(D, D, D, P), LONG_PROMPTS)
    assert found is not None
    worker, role, after = found
    assert (worker.worker_id, role) == ("w0", P)
    assert after > goodput_rps(fleet(D, D, D, P), LONG_PROMPTS)
    assert best_change(fleet(P, D), LONG_PROMPTS) is None  # the last one of a role is worth everything
    assert best_change(fleet(D, P, D, P), replace(LONG_PROMPTS, requests_per_s=0.1)) is None  # all of it is served


def test_advice_is_ripe_when_it_has_held() -> None:
    balancer, workers = Balancer(), fleet(D, D, D, P)
    first = balancer.look(100.0, workers, LONG_PROMPTS)
    assert first is not None
    assert not first.ripe
    assert first.gain > LEAST_GAIN
    assert balancer.look(100.0 + HOLD_S / 2, workers, None) is None  # interrupted
    again = balancer.look(100.0 + HOLD_S, workers, LONG_PROMPTS)
    assert again is not None
    assert not again.ripe
    ripe = balancer.look(100.0 + 2 * HOLD_S, workers, LONG_PROMPTS)
    assert ripe is not None
    assert ripe.ripe
    balancer.changed(100.0 + 2 * HOLD_S, D, P)
    cooling = balancer.look(100.0 + 4 * HOLD_S, workers, LONG_PROMPTS)
    assert cooling is None or not cooling.ripe


def run(demands: list[Demand], roles: list[Role], every_s: float = 5.0) -> list[tuple[float, Role, Role]]:
    """Each demand for one look; ripe advice is followed at once. The changes, with their times."""
    balancer, workers, changes = Balancer(), fleet(*roles), []
    for number, demand in enumerate(demands):
        now_s = number * every_s
        advice = balancer.look(now_s, workers, demand)
        if advice is not None and advice.ripe:
            before = goodput_rps(workers, demand)
            workers = [replace(w, role=advice.to_role) if w.worker_id == advice.worker_id else w for w in workers]
            assert goodput_rps(workers, demand) >= (1 + LEAST_GAIN) * before
            balancer.changed(now_s, advice.from_role, advice.to_role)
            changes.append((now_s, advice.from_role, advice.to_role))
    return changes


def test_a_lasting_demand_is_followed_and_then_nothing_moves() -> None:
    changes = run([LONG_PROMPTS] * 400, [D, D, D, D, D, P])
    assert changes
    assert all((before, after) == (D, P) for _, before, after in changes)
    assert changes[-1][0] < 1000.0
    later = run([LONG_PROMPTS] * 200 + [LONG_ANSWERS] * 400, [D, D, D, D, D, P])
    assert {change[1:] for change in later} == {(D, P), (P, D)}


@pytest.mark.parametrize("period", [1, 2, 5])
def test_a_demand_that_swings_faster_than_advice_ripens_moves_nothing(period: int) -> None:
    swinging = [(LONG_PROMPTS, LONG_ANSWERS)[number // period % 2] for number in range(600)]
    assert run(swinging, [P, P, D, D]) == []


@settings(max_examples=30)
@given(st.integers(0, 1 << 30), st.floats(0.05, 0.6))
def test_noise_does_not_make_it_flap(seed: int, noise: float) -> None:
    """Between two changes the roles rest, and an undone change is rare: at most one in `REGRET_S`."""
    draw = random.Random(seed)
    between = replace(LONG_PROMPTS, uncached_tokens=1500.0, output_tokens=300.0, context_tokens=1650.0)

    def noisy() -> Demand:
        return replace(
            between,
            requests_per_s=between.requests_per_s * draw.uniform(1 - noise, 1 + noise),
            uncached_tokens=between.uncached_tokens * draw.uniform(1 - noise, 1 + noise),
            output_tokens=between.output_tokens * draw.uniform(1 - noise, 1 + noise),
        )

    changes = run([noisy() for _ in range(720)], [P, P, P, D, D, D])  # an hour
    for (before_s, *before), (after_s, *after) in pairwise(changes):
        assert after_s - before_s >= COOL_S
        assert before != after[::-1] or after_s - before_s >= 4 * HOLD_S
    assert len(changes) <= 6


def test_the_meter_follows_rate_and_means() -> None:
    meter = DemandMeter()
    assert meter.now(0.0) is None
    for number in range(400):
        now_s = number * 0.5
        meter.arrived(now_s)
        meter.ended(now_s, 100, 20, 200, 1.0, 0.1)
    found = meter.now(200.0)
    assert found is not None
    assert found.requests_per_s == pytest.approx(2.0, rel=0.02)
    assert (found.uncached_tokens, found.tpot_s) == (pytest.approx(100.0), pytest.approx(0.1))
    assert meter.now(2000.0) is None  # long ago
