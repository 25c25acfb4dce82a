"""Drift counts what the index said in vain, and what it did not know, from each request's own report."""

from __future__ import annotations

import pytest

from router.bench.stub_worker import Fabric, StubSpec, StubWorker
from router.drift import DriftMeter
from tests.support.stub_cluster import GREEDY, MIXED, StubCluster, assert_exact, until


def test_hits_and_misses_are_counted_by_block() -> None:
    drift = DriftMeter()
    assert (drift.false_hit_ratio, drift.false_miss_ratio) == (0.0, 0.0)
    drift.note(predicted_blocks=8, cached_tokens=8 * 16, prompt_tokens=200, block_size=16)
    drift.note(predicted_blocks=8, cached_tokens=6 * 16 + 3, prompt_tokens=200, block_size=16)
    drift.note(predicted_blocks=0, cached_tokens=2 * 16, prompt_tokens=200, block_size=16)
    assert drift.false_hit_ratio == pytest.approx(2 / 16)
    assert drift.false_miss_ratio == pytest.approx(2 / 16)


def test_a_prompt_that_is_all_there_is_no_false_hit() -> None:
    drift = DriftMeter()
    drift.note(predicted_blocks=4, cached_tokens=63, prompt_tokens=64, block_size=16)
    assert (drift.predicted_blocks, drift.false_hit_blocks) == (3, 0)


async def test_a_prompt_sent_twice_at_once_is_expected_where_the_first_went() -> None:
    workers = [StubWorker(StubSpec(name, MIXED, prefill_s=0.2), Fabric()) for name in ("m0", "m1")]
    async with StubCluster(*workers, policy="prefix_only") as cluster:
        generations = [cluster.start(GREEDY, prompt_tokens=600)]
        await until(lambda: bool(generations[0].workers))
        generations += [cluster.start(GREEDY, prompt_tokens=600) for _ in range(3)]
        for generation in generations:
            await assert_exact(generation)
        assert len({generation.workers[0] for generation in generations}) == 1
        drift = cluster.dispatcher.account.drift
        assert drift.predicted_blocks >= 3 * 36
        assert drift.false_hit_blocks == 0
