"""A replay is reproducible, follows the clock of its arrivals, and spreads skewed work; workers may come and go."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from kvstore.keys import BlockKey
from pdserve.slo import Slo
from router.hot_prefixes import HotPrefixes
from router.policy import POLICIES, Speed
from router.replay.run import Replay
from router.replay.setting import Arrival, Outage, Setting
from router.replay.view import RouterView
from router.replay.worker import Touched

BLOCK = 16
SETTING = Setting(
    workers=2,
    block_tokens=BLOCK,
    tokens_per_worker=100 * BLOCK,
    speed=Speed(prefill_tokens_per_s=((1, 1000.0),), step_s=((1, 0.1),)),
    slo=Slo(ttft_s=1.0, tpot_s=0.15),
)


def key(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(16, "big"))


def arrival(at_s: float, blocks: list[int], output_tokens: int = 1) -> Arrival:
    return Arrival(at_s, len(blocks) * BLOCK, output_tokens, tuple(map(key, blocks)))


def skewed(rate: float, duration_s: float, seed: int) -> list[Arrival]:
    """Random arrivals of eight tenants, each with half the traffic of the one before; each has a prefix of its own."""
    draw, at_s, found = random.Random(seed), 0.0, []
    while (at_s := at_s + draw.expovariate(rate)) < duration_s:
        tenant = next((each for each in range(8) if draw.random() < 0.5), 7)
        fresh = [draw.getrandbits(64) + 1_000 for _ in range(draw.randint(1, 24))]
        found.append(arrival(at_s, [tenant * 100 + at for at in range(12)] + fresh, draw.randint(1, 40)))
    return found


def test_one_worker_computes_prompts_one_after_the_other() -> None:
    setting = replace(SETTING, workers=1)
    outcome = Replay(POLICIES["cost"], setting).run([arrival(0.0, list(range(50))), arrival(0.0, [97, 98])])
    assert outcome.ttft_p99_s == pytest.approx(0.832, abs=1e-3)  # 800 tokens, and 32 behind them
    assert outcome.ttft_p50_s == pytest.approx(0.816, abs=1e-3)
    assert (outcome.good_ratio, outcome.hit_ratio) == (1.0, 0.0)


def test_a_prefix_is_found_until_it_was_evicted() -> None:
    setting = replace(SETTING, workers=1)
    prompts = [arrival(float(at), list(range(40))) for at in range(2)]
    assert Replay(POLICIES["cost"], setting).run(prompts).hit_ratio == pytest.approx(0.5, abs=0.001)
    other = arrival(0.5, list(range(100, 190)))  # leaves 10 of 40
    crowded = Replay(POLICIES["cost"], setting).run([prompts[0], other, prompts[1]])
    assert crowded.hit_ratio == pytest.approx(10 / 170)


def test_prompts_hold_up_decoding() -> None:
    setting = replace(SETTING, workers=1)
    alone = [arrival(0.0, [1], output_tokens=11)]
    assert Replay(POLICIES["cost"], setting).run(alone).tpot_p50_s == pytest.approx(0.1)
    disturbed = [*alone, arrival(0.5, list(range(2, 52)))]  # 0.8 s in between
    assert Replay(POLICIES["cost"], setting).run(disturbed).tpot_p50_s == pytest.approx(0.18)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_the_same_replay_twice_has_the_same_outcome(policy: str) -> None:
    trace = skewed(20.0, 30.0, seed=1)
    one, two = (Replay(POLICIES[policy], SETTING).run(trace) for _ in range(2))
    assert replace(one, replayed_requests_per_s=0.0) == replace(two, replayed_requests_per_s=0.0)
    assert one.requests == len(trace)


def test_skewed_tenants_and_a_worker_that_dies_and_joins_leave_no_worker_with_too_much() -> None:
    setting = replace(
        SETTING,
        workers=8,
        tokens_per_worker=4_000 * BLOCK,
        speed=Speed(prefill_tokens_per_s=((1, 20_000.0),)),
        outages=(Outage(3, 130.0, 250.0),),
    )
    outcome = Replay(POLICIES["cost"], setting).run(skewed(80.0, 480.0, seed=2))
    assert outcome.imbalance_60s <= 1.3
    assert outcome.hit_ratio > 0.45  # 12 blocks of 24.5 on average are a tenant's
    assert outcome.good_ratio > 0.99
    assert outcome.failed < 50


def test_nobody_is_there() -> None:
    setting = replace(SETTING, workers=1, outages=(Outage(0, 0.0, 10.0),))
    outcome = Replay(POLICIES["cost"], setting).run([arrival(1.0, [1]), arrival(11.0, [1])])
    assert (outcome.requests, outcome.failed, outcome.good_ratio) == (2, 1, 0.5)


@pytest.mark.parametrize("rate", [8.0, 12.0])
@pytest.mark.parametrize("seed", [3, 4])
def test_several_routers_lose_little_against_one(seed: int, rate: float) -> None:
    """Below and near what the workers serve: 0.01 of the hit ratio, 0.03 of the good ratio, 0.1 of max:mean work."""
    trace = skewed(rate, 60.0, seed)
    setting = replace(SETTING, workers=8, tokens_per_worker=4_000 * BLOCK)
    one, *others = (Replay(POLICIES["cost"], replace(setting, routers=routers)).run(trace) for routers in (1, 2, 4))
    assert one.good_ratio > 0.5
    for several in others:
        assert several.hit_ratio >= one.hit_ratio - 0.01
        assert several.good_ratio >= one.good_ratio - 0.03
        assert several.imbalance <= one.imbalance + 0.1


def test_a_router_hears_at_once_what_another_sent_and_forgets_it_with_the_worker() -> None:
    view = RouterView(HotPrefixes(0, 1.0), report_s=10.0)
    view.joined(0, SETTING.speed)

    def seen() -> tuple[float, ...]:
        return tuple(view.columns._loads[:3, 0])  # waiting and recent tokens, sequences

    view.hears_sent(0, 500, 1.0)
    view.catch_up(1.005)
    assert seen() == (0.0, 0.0, 0.0)
    view.catch_up(1.011)
    assert seen() == (500.0, 500.0, 1.0)
    view.hears_sent(0, 500, 2.0)
    view.lost(0)
    view.catch_up(9.0)
    assert (seen()[0], seen()[2]) == (0.0, 0.0)


def test_a_router_learns_of_anothers_blocks_when_they_are_computed_and_reported() -> None:
    view = RouterView(HotPrefixes(0, 1.0), report_s=0.1)
    view.joined(0, SETTING.speed)
    view.reports_blocks(0, Touched(0, [key(1)], []), 0.25)
    view.catch_up(0.29)
    assert view.index.match([key(1)]).of(0) == 0
    view.catch_up(0.31)
    assert view.index.match([key(1)]).of(0) == 1
    view.reports_blocks(0, Touched(0, [key(2)], []), 0.35)
    view.lost(0)
    view.catch_up(9.0)
    assert view.index.match([key(2)]).of(0) == 0
