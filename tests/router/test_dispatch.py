"""The dispatcher's ordinary ways, its limits, and what clients are told when they are reached."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest

from pdserve.errors import DeadlineExceeded, InvalidRequest, Overloaded, UnknownWorker, WorkerFailed
from pdserve.request import FinishReason
from router.bench.stub_worker import Fabric, StubSpec, StubWorker
from router.wishes import Wishes
from tests.support.faulty_worker import FaultyWorker
from tests.support.stub_cluster import (
    DECODE,
    GREEDY,
    MIXED,
    PREFILL,
    StubCluster,
    assert_exact,
    collect,
    expected,
    until,
    with_limits,
)


def stubs(*names: str, fabric: Fabric | None = None) -> list[StubWorker]:
    fabric = fabric or Fabric()
    roles = {"p": PREFILL, "d": DECODE, "m": MIXED}
    return [StubWorker(StubSpec(name, roles[name[0]]), fabric) for name in names]


async def test_prefill_makes_the_first_token_and_decode_the_rest() -> None:
    prefill, decode = stubs("p0", "d0")
    async with StubCluster(prefill, decode) as cluster:
        generation = cluster.start(GREEDY)
        await assert_exact(generation)
        assert generation.workers == ["p0", "d0"]
        assert [submit.disaggregated for submit in prefill.submits] == [True]
        assert set(generation.timeline.reported) == {"fetch", "queue", "compute", "reserve", "transfer", "commit"}
        assert generation.timeline.dispatched_s is not None
        assert not prefill.aborts + decode.aborts


async def test_a_second_request_finds_the_prefix_of_the_first() -> None:
    async with StubCluster(*stubs("m0", "m1", "m2"), policy="cost") as cluster:
        first = cluster.start(GREEDY, prompt_tokens=64)
        await assert_exact(first)
        await until(lambda: len(cluster.fleet.index) == 4)
        for _ in range(3):
            again = cluster.start(GREEDY, prompt_tokens=64)
            await assert_exact(again)
            assert again.workers == first.workers
            assert again.cached_by_tier == {"device": 64}


async def test_a_stop_token_ends_the_request_where_the_oracle_does() -> None:
    async with StubCluster(*stubs("p0", "d0")) as cluster:
        probe = cluster.start(GREEDY)
        stop = expected(probe)[7]
        await collect(probe)
        generation = cluster.start(replace(GREEDY, stop_token_ids=(stop,)))
        assert await collect(generation) == (expected(probe)[:8], FinishReason.STOP)


@pytest.mark.parametrize("stop_at_first", [False, True])
async def test_a_request_of_one_token_ends_on_prefill_and_leaves_no_reservation(stop_at_first: bool) -> None:
    prefill, decode = stubs("p0", "d0")
    async with StubCluster(prefill, decode) as cluster:
        if stop_at_first:
            probe = cluster.start(GREEDY)
            await collect(probe)
            sampling = replace(GREEDY, stop_token_ids=(expected(probe)[0],))
        else:
            sampling = replace(GREEDY, max_tokens=1)
        generation = cluster.start(sampling)
        tokens, _ = await collect(generation)
        assert tokens == expected(generation)[:1]
        assert prefill.submits[-1].disaggregated == stop_at_first


@pytest.mark.parametrize("names", [("p0",), ("d0",), ("m0",), ("p0", "p1"), ("d0", "m0")])
async def test_any_worker_serves_whole_requests_when_a_role_is_missing(names: tuple[str, ...]) -> None:
    async with StubCluster(*stubs(*names)) as cluster:
        generation = cluster.start(GREEDY)
        await assert_exact(generation)
        assert len(generation.workers) == 1
        assert generation.workers[0] == ("m0" if "m0" in names else names[0])


async def test_direct_runs_the_prompt_where_the_caller_says() -> None:
    async with StubCluster(*stubs("m0", "m1", "m2"), policy="direct") as cluster:
        for name in ("m2", "m0", "m1", "m2"):
            generation = cluster.start(GREEDY, target=name)
            await assert_exact(generation)
            assert generation.workers == [name]
        with pytest.raises(UnknownWorker, match="No worker is named 'm3', as x-pdserve-worker says"):
            cluster.start(GREEDY, target="m3")
        with pytest.raises(UnknownWorker):
            cluster.dispatcher.dry_run(cluster.request(GREEDY), Wishes(target="m3"))
        assert cluster.dispatcher.num_active == 0
        assert not cluster.dispatcher.account.records.find("m3")
        await assert_exact(cluster.start(GREEDY, target="m3", policy="cost"))


async def test_no_worker_in_time_is_overloaded() -> None:
    [mixed] = stubs("m0")
    async with StubCluster(mixed) as cluster:
        await mixed.stop()
        await until(lambda: cluster.fleet.member("m0") is None)
        began_s = time.monotonic()
        with pytest.raises(Overloaded):
            await collect(cluster.start(GREEDY))
        assert 1.0 < time.monotonic() - began_s < 4.0


async def test_a_worker_that_appears_in_time_serves_the_request_that_waits() -> None:
    [mixed] = stubs("m0")
    async with StubCluster(mixed, limits=with_limits(queue_wait_s=8.0)) as cluster:
        address = mixed.address
        await mixed.stop()
        await until(lambda: cluster.fleet.member("m0") is None)
        generation = cluster.start(GREEDY)
        await mixed.start(address)
        await assert_exact(generation)


async def test_beyond_the_limit_of_active_requests_is_overloaded_at_once() -> None:
    mixed = FaultyWorker(StubSpec("m0", MIXED), Fabric(), wedge_at="submit")
    async with StubCluster(mixed, limits=with_limits(active_requests=1)) as cluster:
        first = cluster.start(GREEDY)
        with pytest.raises(Overloaded):
            cluster.start(GREEDY)
        first.abort()
        await assert_exact(cluster.start(GREEDY))


async def test_a_prompt_that_no_worker_has_the_context_for_is_refused_by_name() -> None:
    async with StubCluster(StubWorker(StubSpec("m0", MIXED, num_blocks=4), Fabric())) as cluster:
        with pytest.raises(InvalidRequest, match="64 tokens") as refusal:
            cluster.start(GREEDY, prompt_tokens=64)
        assert refusal.value.param == "prompt"


async def test_workers_that_all_fail_are_a_502_after_one_more_try() -> None:
    fabric = Fabric()
    workers = [FaultyWorker(StubSpec(f"m{n}", MIXED), fabric, error_at="submit") for n in range(3)]
    async with StubCluster(*workers) as cluster:
        with pytest.raises(WorkerFailed):
            await collect(cluster.start(GREEDY))
        assert sum(len(worker.submits) for worker in workers) == 2


async def test_after_the_first_token_two_migrations_are_allowed() -> None:
    fabric = Fabric()
    workers = [FaultyWorker(StubSpec(f"m{n}", MIXED), fabric, error_at="decode") for n in range(4)]
    async with StubCluster(*workers) as cluster:
        with pytest.raises(WorkerFailed):
            await collect(cluster.start(GREEDY))
        assert sum(len(worker.submits) for worker in workers) == 3
        await assert_exact(cluster.start(GREEDY))  # one is left with its fault


async def test_workers_that_make_no_progress_are_a_504() -> None:
    fabric = Fabric()
    workers = [FaultyWorker(StubSpec(f"m{n}", MIXED), fabric, wedge_at="submit") for n in range(2)]
    async with StubCluster(*workers) as cluster:
        with pytest.raises(DeadlineExceeded):
            await collect(cluster.start(GREEDY))


async def test_the_requests_own_deadline_holds_in_the_middle_of_the_stream() -> None:
    async with StubCluster(StubWorker(StubSpec("m0", MIXED, token_s=0.1), Fabric())) as cluster:
        generation = cluster.start(replace(GREEDY, max_tokens=1000), deadline_s=0.5)
        with pytest.raises(DeadlineExceeded):
            await collect(generation)


async def test_an_abort_before_anything_was_placed_is_an_abort() -> None:
    async with StubCluster(*stubs("m0")) as cluster:
        generation = cluster.start(GREEDY)
        generation.abort()
        assert await collect(generation) == ([], FinishReason.ABORT)


async def test_drain_waits_for_what_is_active() -> None:
    async with StubCluster(StubWorker(StubSpec("m0", MIXED, token_s=0.02), Fabric())) as cluster:
        generation = cluster.start(GREEDY)
        assert not await cluster.dispatcher.drain(0.05)
        gathered = asyncio.create_task(assert_exact(generation))
        assert await cluster.dispatcher.drain(5.0)
        await gathered
