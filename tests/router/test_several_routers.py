"""What other routers sent counts as what this one sends: they choose from the same load."""

from __future__ import annotations

import time

from pdserve.protocol import worker_pb2 as pb
from router.bench.stub_worker import Fabric, StubSpec, StubWorker
from router.index import Match
from router.member import Member
from router.policy import LoadView
from tests.support.stub_cluster import GREEDY, MIXED, StubCluster, assert_exact, until, with_limits


def report(worker: StubWorker, **fields: int) -> None:
    for session in worker.sessions:
        session.send(load=pb.LoadReport(free_blocks=4096, total_blocks=4096, **fields))  # type: ignore[arg-type]


def seen(cluster: StubCluster, member: Member) -> LoadView:
    found = cluster.fleet.candidates(Match([]), time.monotonic()).seen
    at = found.roster.worker_ids.index(member.worker_id)
    return LoadView(
        int(found.waiting_tokens[at]),
        float(found.recent_tokens[at]),
        int(found.sequences[at]),
        int(found.context_tokens[at]),
        int(found.free_blocks[at]),
    )


def two() -> list[StubWorker]:
    fabric = Fabric()
    return [StubWorker(StubSpec(name, MIXED), fabric) for name in ("m0", "m1")]


async def test_what_others_sent_is_remembered_once_and_fades() -> None:
    async with StubCluster(*two(), policy="cost", limits=with_limits(queue_wait_s=5.0)) as cluster:
        member = cluster.fleet.member("m0")
        assert member is not None
        for total in (1000, 1000, 1600):  # since the session began: a report told twice adds nothing
            report(cluster.workers["m0"], others_sent_tokens=total, context_tokens=total)
            await until(lambda total=total: member.load.context_tokens == total)  # type: ignore[misc]
        assert 1500 < seen(cluster, member).recent_tokens <= 1600
        generation = cluster.start(GREEDY)  # nothing waits anywhere: the memory alone decides
        await assert_exact(generation)
        assert generation.workers == ["m1"]
        member.leave()  # of a new session the count begins anew
        member.join(member.hello, member.role, time.monotonic())
        report(cluster.workers["m0"], others_sent_tokens=100, context_tokens=7)
        await until(lambda: member.load.context_tokens == 7)
        assert 1600 < seen(cluster, member).recent_tokens <= 1700


async def test_what_waits_of_others_adds_to_ones_own() -> None:
    async with StubCluster(*two(), policy="cost") as cluster:
        member = cluster.fleet.member("m0")
        assert member is not None
        report(cluster.workers["m0"], others_waiting_tokens=500, others_sequences=2)
        await until(lambda: member.load.others_sequences == 2)
        member.take(300)
        load = seen(cluster, member)
        assert (load.waiting_tokens, load.sequences) == (800, 3)
        assert member.backlog_s(time.monotonic()) > 0.0
        report(cluster.workers["m0"], waiting_tokens=900, running_sequences=4, others_waiting_tokens=500)
        await until(lambda: member.load.waiting_tokens == 900)
        load = seen(cluster, member)  # the worker knows more than the routers: a resumed prompt, say
        assert (load.waiting_tokens, load.sequences) == (900, 4)
        member.computed(300)
        member.give_back()
        report(cluster.workers["m0"])
        await until(lambda: not member.load.waiting_tokens)
        assert seen(cluster, member).waiting_tokens == 0
