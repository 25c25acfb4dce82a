"""A computed prompt for which no decode worker has room waits in the store, and goes on where room appears first."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from pdserve.protocol import worker_pb2 as pb
from pdserve.request import FinishReason
from router.bench.stub_worker import Fabric, StubSession, StubSpec, StubWorker
from tests.support.stub_cluster import DECODE, GREEDY, PREFILL, StubCluster, collect, expected, until, with_limits

QUICK = with_limits(spill_after_s=0.1, spill_wait_s=5.0)


class FullWorker(StubWorker):
    """Reports no free block until `make_room`."""

    free_blocks = 0

    def _send_load(self, session: StubSession) -> None:
        session.send(load=pb.LoadReport(free_blocks=self.free_blocks, total_blocks=self.spec.num_blocks))

    def make_room(self) -> None:
        self.free_blocks = self.spec.num_blocks
        for session in self.sessions:
            self._send_load(session)


class HeldPrefill(StubWorker):
    """Computes its last chunk until the test lets it."""

    def __init__(self, spec: StubSpec, fabric: Fabric) -> None:
        super().__init__(spec, fabric)
        self.computed = asyncio.Event()

    async def at(self, phase: str, session: StubSession, submit: pb.Submit) -> None:
        if phase == "first_token":
            await self.computed.wait()


def site(*, store: bool = True) -> tuple[HeldPrefill, FullWorker]:
    fabric = Fabric()
    prefill = HeldPrefill(StubSpec("p0", PREFILL, has_store=store), fabric)
    return prefill, FullWorker(StubSpec("d0", DECODE, has_store=store), fabric)


async def test_spilled_request_goes_on_on_the_decode_worker_that_gets_room() -> None:
    prefill, decode = site()
    prefill.computed.set()
    async with StubCluster(prefill, decode, limits=QUICK) as cluster:
        generation = cluster.start(GREEDY)
        await until(lambda: cluster.dispatcher.counts["spills"] == 1)
        # Nothing of it stays on the prefill worker.
        await until(lambda: (generation.request.request_id, 1) in prefill.aborts)
        assert decode.submits == []
        decode.make_room()
        assert await collect(generation) == (expected(generation), FinishReason.LENGTH)
        assert generation.workers == ["p0", "d0"]
        [resumed] = decode.submits
        assert not resumed.disaggregated
        assert list(resumed.output_token_ids) == expected(generation)[:1]


async def test_nothing_is_given_up_before_the_prompt_is_computed() -> None:
    prefill, decode = site()
    async with StubCluster(prefill, decode, limits=with_limits(spill_after_s=0.0, first_token_s=30.0)) as cluster:
        generation = cluster.start(GREEDY)
        await until(lambda: bool(prefill.submits))
        await asyncio.sleep(0.3)  # three looks at a fleet without room
        assert prefill.aborts == []
        prefill.computed.set()
        await until(lambda: cluster.dispatcher.counts["spills"] == 1)
        decode.make_room()
        assert await collect(generation) == (expected(generation), FinishReason.LENGTH)


async def test_prefill_goes_on_alone_when_nobody_gets_room_in_time() -> None:
    prefill, decode = site()
    prefill.computed.set()
    async with StubCluster(prefill, decode, limits=replace(QUICK, spill_wait_s=0.3)) as cluster:
        generation = cluster.start(GREEDY)
        assert await collect(generation) == (expected(generation), FinishReason.LENGTH)
        assert generation.workers == ["p0"]
        assert [submit.disaggregated for submit in prefill.submits] == [True, False]


async def test_without_a_store_nothing_spills() -> None:
    prefill, decode = site(store=False)
    prefill.computed.set()
    async with StubCluster(prefill, decode, limits=replace(QUICK, handoff_wait_s=0.3)) as cluster:
        generation = cluster.start(GREEDY)
        assert await collect(generation) == (expected(generation), FinishReason.LENGTH)
        assert cluster.dispatcher.counts["spills"] == 0
        assert generation.workers == ["p0"]


async def test_aborted_while_it_waits_in_the_store() -> None:
    prefill, decode = site()
    prefill.computed.set()
    async with StubCluster(prefill, decode, limits=QUICK) as cluster:
        generation = cluster.start(GREEDY)
        await until(lambda: cluster.dispatcher.counts["spills"] == 1)
        generation.abort()
        assert (await collect(generation))[1] is FinishReason.ABORT
        decode.make_room()
        assert decode.submits == []
