"""Workers get what keeps them busy, the rest waits in the router; whoever leaves the queue leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pdserve.errors import DeadlineExceeded, InternalError, Overloaded
from pdserve.protocol import worker_pb2 as pb
from pdserve.request import FinishReason
from router.admission import Mode
from router.bench.stub_worker import Fabric, StubSession, StubSpec, StubWorker
from router.explain import Explainer
from router.feeder import Depth
from router.placement import Placer
from router.policy import Decision, Need
from router.routed import RoutedGeneration
from router.slo import CLASSES, SloClass
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

PATIENT = with_limits(first_token_s=15.0, queue_wait_s=5.0)
LONG = 4000  # tokens: two seconds for a worker that was not measured yet


class GatedWorker(StubWorker):
    """Computes prompts one after the other, each when the test says so."""

    def __init__(self, spec: StubSpec, fabric: Fabric | None = None) -> None:
        super().__init__(spec, fabric or Fabric())
        self.gate = asyncio.Semaphore(0)
        self.began: list[str] = []

    async def at(self, phase: str, session: StubSession, submit: pb.Submit) -> None:
        if phase == "submit":
            await self.gate.acquire()
            self.began.append(submit.request_id)

    def open(self, prompts: int = 1000) -> None:
        for _ in range(prompts):
            self.gate.release()


def mixed(name: str = "m0") -> GatedWorker:
    return GatedWorker(StubSpec(name, MIXED))


def slo(name: str) -> SloClass:
    """`standard` with room for a slow machine: what it can still meet must not hang on how fast the test runs."""
    return replace(CLASSES[name], ttft_s=30.0) if name == "standard" else CLASSES[name]


async def waiting(cluster: StubCluster, count: int) -> None:
    await until(lambda: sum(cluster.dispatcher.feeder.depths().values()) == count)


async def fill(cluster: StubCluster, worker: GatedWorker) -> RoutedGeneration:
    """One prompt that keeps the worker busy until its gate opens."""
    generation = cluster.start(GREEDY, prompt_tokens=LONG, slo=slo("batch"))
    await until(lambda: len(worker.submits) == 1)
    return generation


async def test_a_busy_worker_gets_no_more_than_keeps_it_busy_and_the_rest_by_slack() -> None:
    worker = mixed()
    async with StubCluster(worker, limits=PATIENT) as cluster:
        started = [await fill(cluster, worker)]
        for number, name in enumerate(("batch", "standard", "interactive", "standard")):
            started.append(cluster.start(GREEDY, prompt_tokens=LONG, first_token=1 + number, slo=slo(name)))
            await waiting(cluster, number + 1)
        assert len(worker.submits) == 1
        assert cluster.dispatcher.feeder.depths() == {"batch": 1, "standard": 2, "interactive": 1}
        worker.open()
        await asyncio.gather(*(assert_exact(each) for each in started))
        ids = [each.request.request_id for each in started]
        # The interactive one cannot meet its second any more: it goes behind what can still be good.
        assert worker.began == [ids[0], ids[2], ids[4], ids[1], ids[3]]


async def test_priority_changes_the_order_of_turns() -> None:
    worker = mixed()
    async with StubCluster(worker, limits=PATIENT) as cluster:
        started = [await fill(cluster, worker)]
        for number, priority in enumerate((0, 50, -3)):
            started.append(
                cluster.start(GREEDY, prompt_tokens=LONG, first_token=1 + number, slo=slo("batch"), priority=priority)
            )
            await waiting(cluster, number + 1)
        worker.open()
        await asyncio.gather(*(assert_exact(each) for each in started))
        ids = [each.request.request_id for each in started]
        assert worker.began == [ids[0], ids[3], ids[1], ids[2]]


async def test_what_waited_is_in_the_timeline_in_explain_and_in_the_metrics() -> None:
    worker = mixed()
    async with StubCluster(worker, limits=PATIENT) as cluster:
        first = await fill(cluster, worker)
        second = cluster.start(GREEDY, prompt_tokens=LONG, first_token=1)
        await waiting(cluster, 1)
        await asyncio.sleep(0.2)
        worker.open()
        await asyncio.gather(assert_exact(first), assert_exact(second))
        stages = second.timeline.ttft_stages()
        assert stages["wait"] > 0.2
        assert sum(stages.values()) == pytest.approx(second.timeline.ttft_s)
        record = Explainer(cluster.fleet, cluster.dispatcher).explain(second.request.request_id)
        assert record is not None
        assert record["actual"]["ttft_stages_s"]["wait"] == stages["wait"]
        assert record["admission"]["forecast"]["prompts_s"] > 0.0
        [family] = cluster.dispatcher.feeder.wait_seconds.collect()
        counts = {sample.labels["slo_class"]: sample.value for sample in family.samples if sample.name[-5:] == "count"}
        assert counts == {"batch": 1, "standard": 1}


@pytest.mark.parametrize("mode", [Mode.OFF, Mode.SHADOW])
async def test_out_of_enforcement_everything_is_served_however_late(mode: Mode) -> None:
    worker = mixed()
    async with StubCluster(worker, limits=PATIENT, mode=mode) as cluster:
        started = [await fill(cluster, worker)]
        started += [cluster.start(GREEDY, prompt_tokens=100 + n, slo=slo("interactive")) for n in range(6)]
        await waiting(cluster, 6)
        worker.open()
        await asyncio.gather(*(assert_exact(each) for each in started))
        ledger = cluster.dispatcher.feeder.ledger
        assert not ledger.refused
        condemned = sum(count for (_, reason), count in ledger.verdicts.items() if reason)
        assert (condemned > 0) == (mode is Mode.SHADOW)
        assert sum(ledger.checked.values()) == (7 if mode is Mode.SHADOW else 0)


async def test_what_would_miss_its_class_is_refused_at_once_and_told_when_to_come_back() -> None:
    worker = mixed()
    async with StubCluster(worker, limits=PATIENT, mode=Mode.ENFORCE) as cluster:
        first = await fill(cluster, worker)
        hasty = SloClass("custom", ttft_s=1.0, tpot_s=1.0)
        refused = cluster.start(GREEDY, prompt_tokens=100, slo=hasty)
        with pytest.raises(Overloaded) as error:
            await collect(refused)
        assert error.value.code == "slo_ttft"
        assert error.value.retry_after_s >= 1
        assert len(worker.submits) == 1
        account = cluster.dispatcher.account
        assert account.goodput.by_class()["custom", "refused"] == 1
        record = account.records.find(refused.request.request_id)
        assert record is not None
        assert record.describe()["admission"]["refused"] is True
        worker.open()
        await assert_exact(first)
        # The worker is idle again before the refused one's time is over: it could have been served after all.
        ledger = cluster.dispatcher.feeder.ledger
        await until(lambda: not ledger.watching)
        assert sum(ledger.checked.values()) == 2


async def test_the_idle_fleet_refuses_nobody() -> None:
    worker = mixed()
    worker.open()
    impossible = SloClass("custom", ttft_s=1e-6, tpot_s=1e-6)
    async with StubCluster(worker, limits=PATIENT, mode=Mode.ENFORCE) as cluster:
        await assert_exact(cluster.start(GREEDY, prompt_tokens=LONG, slo=impossible))


async def test_a_client_that_leaves_the_queue_leaves_nothing_behind() -> None:
    worker = mixed()
    async with StubCluster(worker, limits=PATIENT) as cluster:
        first = await fill(cluster, worker)
        left = [cluster.start(GREEDY, prompt_tokens=LONG, first_token=1 + n) for n in range(5)]
        await waiting(cluster, 5)
        for generation in left:
            generation.abort()
            assert await collect(generation) == ([], FinishReason.ABORT)
        await waiting(cluster, 0)
        worker.open()
        await assert_exact(first)
        assert len(worker.submits) == 1


async def test_leaving_in_the_very_moment_of_its_turn_gives_the_worker_back() -> None:
    worker = mixed()
    async with StubCluster(worker, limits=PATIENT) as cluster:
        first = await fill(cluster, worker)
        second = cluster.start(GREEDY, prompt_tokens=LONG, first_token=1)
        await waiting(cluster, 1)
        serve = cluster.dispatcher.feeder._serve

        def serve_and_leave(*args: object) -> None:
            serve(*args)  # type: ignore[arg-type]
            if not cluster.dispatcher.feeder.depths():
                second.abort()

        cluster.dispatcher.feeder._serve = serve_and_leave  # type: ignore[method-assign]
        worker.open()
        await assert_exact(first)
        assert await collect(second) == ([], FinishReason.ABORT)
        assert len(worker.submits) == 1  # what the cluster checks at its end: no share of the load is left


async def test_its_own_deadline_ends_the_wait() -> None:
    worker = mixed()
    async with StubCluster(worker, limits=PATIENT) as cluster:
        first = await fill(cluster, worker)
        with pytest.raises(DeadlineExceeded):
            await collect(cluster.start(GREEDY, prompt_tokens=LONG, deadline_s=0.5))
        worker.open()
        await assert_exact(first)


async def test_the_queue_is_bounded() -> None:
    worker = mixed()
    async with StubCluster(worker, limits=with_limits(first_token_s=15.0, queue_places=10)) as cluster:
        started = [await fill(cluster, worker)]
        started += [cluster.start(GREEDY, prompt_tokens=LONG, first_token=1 + n) for n in range(8)]
        await waiting(cluster, 8)
        with pytest.raises(Overloaded) as error:
            await collect(cluster.start(GREEDY))
        assert (error.value.status, error.value.code) == (429, "tenant_share")
        started.append(cluster.start(GREEDY, tenant="other"))
        await waiting(cluster, 9)
        worker.open()
        await asyncio.gather(*(assert_exact(each) for each in started))


async def test_a_dead_worker_takes_only_what_it_had_with_it() -> None:
    """The others have not been sent anywhere: they lose nothing, not even a retry."""
    dies, lives = mixed("m0"), mixed("m1")
    async with StubCluster(dies, lives, limits=PATIENT, policy="cost") as cluster:
        started = [cluster.start(GREEDY, prompt_tokens=LONG, first_token=1 + n) for n in range(6)]
        await until(lambda: len(dies.submits) + len(lives.submits) == 2)
        await waiting(cluster, 4)
        await dies.stop()
        lives.open()
        await asyncio.gather(*(assert_exact(each) for each in started))
        assert cluster.dispatcher.counts["redispatches"] == 1


async def test_a_request_waits_for_the_worker_that_has_its_prefix_but_not_longer_than_pays() -> None:
    holder, other = mixed("m0"), mixed("m1")
    async with StubCluster(holder, other, limits=PATIENT, policy="cost") as cluster:
        holder.open(1)
        other.open(1)
        warm = cluster.start(GREEDY, prompt_tokens=LONG)
        await assert_exact(warm)
        home, away = (holder, other) if warm.workers == ["m0"] else (other, holder)
        await until(lambda: len(cluster.fleet.index) == LONG // 16)
        # Both are busy with short prompts; the one that follows is at home in a fraction of the time.
        started = [cluster.start(GREEDY, prompt_tokens=LONG) for _ in range(2)]
        await until(lambda: len(home.submits) >= 2)
        home.open()
        away.open()
        await asyncio.gather(*(assert_exact(each) for each in started))
        assert all(each.workers == warm.workers for each in started)


def decode_loads(worker: StubWorker, running: int, step_s: float) -> None:
    for session in worker.sessions:
        load = pb.LoadReport(running_sequences=running, step_s=step_s, context_tokens=100 * running, free_blocks=4096)
        session.send(load=load)


@pytest.mark.parametrize("mode", [Mode.SHADOW, Mode.ENFORCE])
async def test_a_full_decode_batch_keeps_prompts_waiting_while_that_helps(mode: Mode) -> None:
    """Shadow lets it go when its TTFT is lost all the same; enforcement keeps the others' TPOT."""
    fabric = Fabric()
    prefill, decode = StubWorker(StubSpec("p0", PREFILL), fabric), StubWorker(StubSpec("d0", DECODE), fabric)
    async with StubCluster(prefill, decode, limits=PATIENT, mode=mode) as cluster:
        member = cluster.fleet.member("d0")
        assert member is not None
        for running in (1, 10, 20):
            decode_loads(decode, running, 0.01 * running)  # 10 ms a sequence
            await until(lambda running=running: member.load.running_sequences == running)  # type: ignore[misc]
        tight = SloClass("custom", ttft_s=1.0, tpot_s=0.1)
        generation = cluster.start(GREEDY, slo=tight)
        await waiting(cluster, 1)
        await asyncio.sleep(0.3)
        assert not prefill.submits
        assert cluster.dispatcher.feeder.backlog() == {("custom", "decode"): Depth(1, 40)}
        if mode is Mode.ENFORCE:
            await asyncio.sleep(1.0)
            assert not prefill.submits
            decode_loads(decode, 2, 0.02)
        await assert_exact(generation)


async def test_numbers_of_ones_own_hold_up_nobody_else() -> None:
    """One client that wants 20 ms a token, of which the batch is capable of alone, leaves the batch to others."""
    fabric = Fabric()
    prefill = StubWorker(StubSpec("p0", PREFILL), fabric)
    decode = StubWorker(StubSpec("d0", DECODE, token_s=0.1), fabric)
    async with StubCluster(prefill, decode, limits=PATIENT, mode=Mode.ENFORCE) as cluster:
        member = cluster.fleet.member("d0")
        assert member is not None
        for running in (4, 2, 1):
            decode_loads(decode, running, 0.01 * running)
            await until(lambda running=running: member.load.running_sequences == running)  # type: ignore[misc]
        decode_loads(decode, 0, 0.01)
        await until(lambda: member.load.running_sequences == 0)
        strict = cluster.start(GREEDY, slo=SloClass("custom", ttft_s=5.0, tpot_s=0.02))
        await until(lambda: len(prefill.submits) == 1)
        others = [cluster.start(GREEDY, slo=slo("standard")) for _ in range(3)]
        await until(lambda: len(prefill.submits) == 4)
        assert cluster.dispatcher.num_active == 4
        await asyncio.gather(*(assert_exact(each) for each in (strict, *others)))


async def test_a_worker_that_appears_serves_the_queue() -> None:
    worker = mixed()
    async with StubCluster(worker, limits=PATIENT) as cluster:
        address = worker.address
        await worker.stop()
        await until(lambda: cluster.fleet.member("m0") is None)
        started = [cluster.start(GREEDY, prompt_tokens=40 + n) for n in range(5)]
        await waiting(cluster, 5)
        await worker.start(address)
        worker.open()
        await asyncio.gather(*(assert_exact(each) for each in started))


async def test_conservation_every_request_ends_once_whatever_happens() -> None:
    """Arrivals of all classes and tenants, some leave, some are refused, one worker dies: each has one end."""
    ends: list[str] = []
    workers = [GatedWorker(StubSpec(name, MIXED, prefill_s=0.005)) for name in ("m0", "m1")]
    async with StubCluster(*workers, limits=PATIENT, policy="cost", mode=Mode.ENFORCE) as cluster:
        for worker in workers:
            worker.open()
        started = [
            cluster.start(
                GREEDY,
                prompt_tokens=100 + number,
                slo=slo(("interactive", "standard", "batch")[number % 3]),
                tenant=f"t{number % 4}",
            )
            for number in range(60)
        ]
        readers = [asyncio.create_task(_end_of(each, ends.append)) for each in started]
        for generation in started[::7]:
            generation.abort()
        await workers[0].stop()
        await asyncio.gather(*readers)
        assert len(ends) == len(started)
        assert not cluster.dispatcher.feeder.depths()
        assert not cluster.dispatcher.feeder._running
        await until(lambda: not cluster.dispatcher.feeder.ledger.watching)


async def _end_of(generation: RoutedGeneration, note: Callable[[str], None]) -> None:
    try:
        _, finish = await collect(generation)
        assert finish is not None
        note(finish.value)
    except Overloaded as error:
        note(str(error.code))


async def test_a_policy_that_raises_fails_its_own_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, armed, preview = mixed(), False, Placer.preview

    def previews(placement: Placer, need: Need, keys: Any) -> Decision:
        if armed and need.tokens == LONG + 1:
            raise ZeroDivisionError
        return preview(placement, need, keys)

    monkeypatch.setattr(Placer, "preview", previews)
    async with StubCluster(worker, limits=PATIENT) as cluster:
        good = [await fill(cluster, worker)]
        bad = cluster.start(GREEDY, prompt_tokens=LONG + 1)
        good.append(cluster.start(GREEDY, prompt_tokens=LONG, first_token=1))
        await waiting(cluster, 2)
        armed = True
        worker.open()
        await asyncio.gather(*(assert_exact(each) for each in good))
        with pytest.raises(InternalError):
            await collect(bad)
        await until(lambda: not any(cluster.dispatcher.feeder.depths().values()))
