"""Whatever a worker does, at whatever phase: the client's stream is the undisturbed one, and nothing is left behind."""

from __future__ import annotations

import asyncio

import pytest

from pdserve.request import FinishReason
from router.bench.stub_worker import Fabric, StubSpec, StubWorker
from tests.support.faulty_worker import FaultyWorker
from tests.support.stub_cluster import (
    DECODE,
    GREEDY,
    MIXED,
    PREFILL,
    StubCluster,
    assert_exact,
    collect,
    until,
    with_limits,
)

PREFILL_PHASES = ("submit", "handoff_wanted", "first_token", "handoff")
DECODE_PHASES = ("reserve", "commit", "decode")
KINDS = ("die", "wedge", "freeze", "error")


def pair(fault: dict[str, str], role: int, fabric: Fabric) -> list[StubWorker]:
    """Two of each role, the first of `role` with the fault; round robin begins with the first ones."""
    workers: list[StubWorker] = []
    for name, its_role in (("p", PREFILL), ("d", DECODE)):
        for number in range(2):
            spec = StubSpec(f"{name}{number}", its_role, token_s=0.002)
            faulty = its_role == role and number == 0
            workers.append(FaultyWorker(spec, fabric, **fault) if faulty else StubWorker(spec, fabric))
    return workers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("role", "phase"), [*((PREFILL, phase) for phase in PREFILL_PHASES), *((DECODE, phase) for phase in DECODE_PHASES)]
)
async def test_a_worker_that_fails_at_any_phase_does_not_change_the_stream(role: int, phase: str, kind: str) -> None:
    workers = pair({f"{kind}_at": phase}, role, Fabric())
    async with StubCluster(*workers) as cluster:
        generation = cluster.start(GREEDY)
        await assert_exact(generation)
        faulty = workers[0] if role == PREFILL else workers[2]
        assert isinstance(faulty, FaultyWorker)
        assert phase in faulty.reached
        assert len(generation.workers) >= 2
        faulty.thawed.set()


@pytest.mark.parametrize(("role", "phase"), [(PREFILL, "submit"), (DECODE, "reserve"), (DECODE, "commit")])
async def test_a_refusal_moves_the_request_on(role: int, phase: str) -> None:
    workers = pair({"refuse_at": phase}, role, Fabric())
    async with StubCluster(*workers) as cluster:
        generation = cluster.start(GREEDY)
        await assert_exact(generation)
        assert (cluster.dispatcher.counts["migrations"] > 0) == (phase == "commit")


@pytest.mark.parametrize("kind", ["die", "error"])
@pytest.mark.parametrize("phase", ["submit", "first_token", "decode"])
async def test_a_mixed_worker_is_replaced_by_another(phase: str, kind: str) -> None:
    fabric = Fabric()
    faulty = FaultyWorker(StubSpec("m0", MIXED, token_s=0.002), fabric, **{f"{kind}_at": phase})
    async with StubCluster(faulty, StubWorker(StubSpec("m1", MIXED), fabric)) as cluster:
        generation = cluster.start(GREEDY)
        await assert_exact(generation)
        assert generation.workers == ["m0", "m1"]


async def test_a_death_during_the_hand_over_is_not_waited_out() -> None:
    limits = with_limits(handoff_base_s=60.0, handoff_cap_s=60.0)
    async with StubCluster(*pair({"die_at": "handoff"}, PREFILL, Fabric()), limits=limits) as cluster:
        await assert_exact(cluster.start(GREEDY))


async def test_a_late_reservation_names_the_tokens_that_prefill_was_submitted() -> None:
    """Decode learns the tokens made since then from the hand-over itself."""
    fabric = Fabric()
    decode = FaultyWorker(StubSpec("d0", DECODE), fabric, refuse_at="reserve")
    async with StubCluster(StubWorker(StubSpec("p0", PREFILL), fabric), decode) as cluster:
        await assert_exact(cluster.start(GREEDY))
    assert [list(reserve.request.output_token_ids) for reserve in decode.reserves] == [[], []]
    assert decode.reserves[1].prefill_worker_id == "p0"


async def test_stale_doubled_and_swapped_tokens_are_sorted_out() -> None:
    fabric = Fabric()
    workers = [FaultyWorker(StubSpec(n, r), fabric, noisy=True) for n, r in (("p0", PREFILL), ("d0", DECODE))]
    async with StubCluster(*workers) as cluster:
        for _ in range(3):
            await assert_exact(cluster.start(GREEDY))
        assert cluster.dispatcher.counts["rejected_tokens"] > 3 * 2 * GREEDY.max_tokens
        assert not cluster.dispatcher.counts["migrations"]


async def test_a_thawed_worker_cannot_add_to_a_stream_that_moved_on() -> None:
    workers = pair({"freeze_at": "decode"}, DECODE, Fabric())
    frozen = workers[2]
    assert isinstance(frozen, FaultyWorker)
    async with StubCluster(*workers) as cluster:
        generation = cluster.start(GREEDY)
        gathered = asyncio.create_task(collect(generation))
        await until(lambda: frozen.frozen)
        await until(lambda: len(generation.workers) > 2)
        frozen.thawed.set()
        tokens, finish = await gathered
        assert finish is FinishReason.LENGTH
        assert len(tokens) == GREEDY.max_tokens
        await until(lambda: cluster.fleet.member("d0") is not None)


async def test_the_last_decode_worker_dies_and_prefill_goes_on_alone() -> None:
    fabric = Fabric()
    decode = FaultyWorker(StubSpec("d0", DECODE, token_s=0.002), fabric, die_at="decode")
    async with StubCluster(StubWorker(StubSpec("p0", PREFILL), fabric), decode) as cluster:
        await assert_exact(cluster.start(GREEDY))


async def test_without_room_on_decode_prefill_goes_on_alone_after_a_bounded_wait() -> None:
    fabric = Fabric()
    decode = FaultyWorker(StubSpec("d0", DECODE), fabric, wedge_at="reserve")
    prefill = StubWorker(StubSpec("p0", PREFILL), fabric)
    async with StubCluster(prefill, decode) as cluster:
        generation = cluster.start(GREEDY)
        first = await anext(aiter(generation))
        assert len(first.token_ids) == 1, "the first token does not wait for the hand-over"
        tokens, finish = await collect(generation)
        assert len(tokens) == GREEDY.max_tokens - 1
        assert finish is FinishReason.LENGTH
        assert generation.workers == ["p0"]
        assert [submit.disaggregated for submit in prefill.submits] == [True, False]
        assert list(prefill.submits[1].output_token_ids) == list(first.token_ids)


@pytest.mark.parametrize(
    ("role", "phase"), [*((PREFILL, phase) for phase in PREFILL_PHASES), *((DECODE, phase) for phase in DECODE_PHASES)]
)
async def test_an_abort_at_any_phase_reaches_every_worker_of_the_attempt(role: int, phase: str) -> None:
    fabric = Fabric()
    kinds = (("p0", PREFILL), ("d0", DECODE))
    workers = [
        FaultyWorker(StubSpec(name, its), fabric, **({"wedge_at": phase} if its == role else {})) for name, its in kinds
    ]
    faulty = workers[0] if role == PREFILL else workers[1]
    async with StubCluster(*workers) as cluster:
        generation = cluster.start(GREEDY)
        await until(lambda: phase in faulty.reached)
        generation.abort()
        generation.abort()
        _, finish = await collect(generation)
        assert finish is FinishReason.ABORT
        name = (generation.request.request_id, 1)
        for worker in workers:
            if worker.reached:
                await until(lambda worker=worker: name in worker.aborts)
    assert not any(fabric.arrivals)


async def test_many_requests_survive_the_death_of_one_worker_of_each_role() -> None:
    fabric = Fabric()
    workers = [StubWorker(StubSpec(f"p{n}", PREFILL), fabric) for n in range(2)]
    workers += [StubWorker(StubSpec(f"d{n}", DECODE, token_s=0.01), fabric) for n in range(2)]
    async with StubCluster(*workers, limits=with_limits(first_token_s=10.0, inter_token_s=10.0)) as cluster:
        generations = [cluster.start(GREEDY, prompt_tokens=20 + n) for n in range(30)]
        gathered = [asyncio.create_task(assert_exact(generation)) for generation in generations]
        await until(lambda: sum(len(session.tasks) for session in workers[2].sessions) > 5)
        await workers[2].stop()
        await workers[0].stop()
        await asyncio.gather(*gathered)
