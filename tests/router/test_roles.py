"""Roles change under load without a request lost or changed; what cannot be done is answered in clear text."""

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest

from pdserve.errors import Conflict, InvalidRequest, Overloaded, UnknownWorker
from pdserve.protocol import worker_pb2 as pb
from pdserve.request import SamplingParams
from router.bench.stub_worker import Fabric, StubSpec, StubWorker
from router.limits import RouterLimits
from router.policy import Role
from router.roles import RoleChanger
from tests.support.stub_cluster import DECODE, GREEDY, MIXED, PREFILL, StubCluster, assert_exact, until

_ROLES = {"p": PREFILL, "d": DECODE, "m": MIXED}


def workers(*names: str, token_s: float = 0.0) -> list[StubWorker]:
    fabric = Fabric()
    return [StubWorker(StubSpec(name, _ROLES[name[0]], token_s=token_s), fabric) for name in names]


def role_of(cluster: StubCluster, name: str) -> tuple[Role, Role | None]:
    member = cluster.fleet.member(name)
    assert member is not None
    return member.role, member.next_role


async def test_the_router_sees_the_change_and_links_follow() -> None:
    async with StubCluster(*workers("p0", "p1", "d0", "d1")) as cluster:
        report = await RoleChanger(cluster.fleet).change("d1", Role.PREFILL)
        assert report == pb.RoleReport(role=DECODE, next_role=PREFILL)
        await until(lambda: role_of(cluster, "d1") == (Role.PREFILL, None))
        d1 = cluster.fleet.member("d1")
        assert d1 is not None
        await until(
            lambda: d1.partners == 1 and all(m.partners == 1 for m in cluster.members() if m.role is Role.PREFILL)
        )
        assert cluster.fleet.role_changes == {("decode", "prefill"): 1}
        for number in range(6):
            await assert_exact(cluster.start(GREEDY, first_token=100 * number))
        assert cluster.workers["d1"].submits
        await RoleChanger(cluster.fleet).change("d1", Role.DECODE)
        await until(lambda: role_of(cluster, "d1") == (Role.DECODE, None))
        await until(lambda: all(m.partners == 2 for m in cluster.members() if m.role is Role.PREFILL))


async def test_a_draining_worker_gets_nothing_new_and_what_runs_there_is_whole() -> None:
    async with StubCluster(*workers("m0", "m1", token_s=0.02)) as cluster:
        running = [asyncio.create_task(assert_exact(cluster.start(GREEDY, first_token=100 * n))) for n in range(4)]
        await until(lambda: len(cluster.workers["m0"].submits) == len(cluster.workers["m1"].submits) == 2)
        await RoleChanger(cluster.fleet).change("m0", Role.PREFILL)
        await until(lambda: role_of(cluster, "m0") == (Role.MIXED, Role.PREFILL))
        entry = next(each for each in cluster.fleet.topology()["workers"] if each["worker_id"] == "m0")
        assert (entry["state"], entry["next_role"]) == ("draining", "prefill")
        later = cluster.start(GREEDY, first_token=900)
        await assert_exact(later)
        assert later.workers == ["m1"]
        await asyncio.gather(*running)
        await until(lambda: role_of(cluster, "m0") == (Role.PREFILL, None))
        assert not cluster.dispatcher.counts["migrations"]


async def test_what_is_not_over_in_time_moves_more_often_than_a_failing_request_may() -> None:
    """Moving costs no retry: a request survives as many changes as there are."""
    async with StubCluster(*workers("m0", "m1", token_s=0.05)) as cluster:
        generation = cluster.start(SamplingParams(max_tokens=40, seed=3, temperature=0.0))
        running = asyncio.create_task(assert_exact(generation))
        changer = RoleChanger(cluster.fleet)
        for number in range(5):
            await until(lambda: any(map(_runs, cluster.workers.values())))
            [busy] = [name for name, worker in cluster.workers.items() if _runs(worker)]
            worker = cluster.workers[busy]
            wanted = Role.DECODE if role_of(cluster, busy)[0] is Role.MIXED else Role.MIXED
            await changer.change(busy, wanted, drain_s=0.0, force=True)
            await until(lambda worker=worker: not _runs(worker))  # type: ignore[misc]
            await until(lambda: all(member.next_role is None for member in cluster.members()))
            assert not running.done(), number
        await running
        assert cluster.dispatcher.counts["migrations"] > RouterLimits().migrations


def _runs(worker: StubWorker) -> bool:
    return any(session.tasks for session in worker.sessions)


async def test_roles_flip_at_random_under_load_and_every_answer_is_exact() -> None:
    draw = random.Random(5)
    async with StubCluster(*workers("p0", "p1", "d0", "d1", "m0", token_s=0.004)) as cluster:
        changer = RoleChanger(cluster.fleet)
        stop = asyncio.Event()

        async def flip() -> None:
            while not stop.is_set():
                name, role = draw.choice(sorted(cluster.workers)), draw.choice(list(Role))
                with contextlib.suppress(Conflict):
                    await changer.change(name, role, drain_s=draw.choice((0.0, 0.05, 1.0)))
                await asyncio.sleep(0.03)

        flipping = [asyncio.create_task(flip()) for _ in range(2)]
        for wave in range(4):
            asked = [cluster.start(GREEDY, first_token=1000 * wave + 50 * n, deadline_s=30.0) for n in range(20)]
            await asyncio.gather(*map(assert_exact, asked))
        stop.set()
        await asyncio.gather(*flipping)
        await until(lambda: all(member.next_role is None for member in cluster.members()))
        assert sum(cluster.fleet.role_changes.values()) > 5


async def test_clear_answers() -> None:
    async with StubCluster(*workers("p0", "d0", "d1", token_s=0.2)) as cluster:
        changer = RoleChanger(cluster.fleet)
        with pytest.raises(UnknownWorker, match="No worker is named 'nobody'"):
            await changer.change("nobody", Role.DECODE)
        with pytest.raises(Conflict, match="p0 is the last prefill worker") as last:
            await changer.change("p0", Role.DECODE)
        assert (last.value.status, last.value.code) == (409, "last_of_role")
        assert await changer.change("p0", Role.PREFILL) == pb.RoleReport(role=PREFILL)
        assert (await changer.change("p0", Role.MIXED)).next_role == MIXED  # it does what a prefill worker does
        await until(lambda: role_of(cluster, "p0") == (Role.MIXED, None))
        running = asyncio.create_task(assert_exact(cluster.start(GREEDY)))
        await until(lambda: _runs(cluster.workers["p0"]))
        first, second = await asyncio.gather(
            changer.change("p0", Role.PREFILL), changer.change("p0", Role.DECODE), return_exceptions=True
        )
        assert isinstance(second, Conflict)
        assert second.code == "role_changes_already"
        assert first == await changer.change("p0", Role.PREFILL)  # again the same: no harm
        running.cancel()
        cluster.dispatcher.abort_all()
        await until(lambda: role_of(cluster, "p0") == (Role.PREFILL, None))
        await cluster.workers["d1"].stop()
        await until(lambda: cluster.fleet.member("d1") is None)
        with pytest.raises(Overloaded, match="d1 is not reached") as dead:
            await changer.change("d1", Role.PREFILL)
        assert dead.value.code == "worker_unreachable"
        with pytest.raises(Conflict, match="last decode worker"):
            await changer.change("d0", Role.PREFILL)
        await changer.change("d0", Role.PREFILL, force=True)
        await until(lambda: role_of(cluster, "d0") == (Role.PREFILL, None))
        await assert_exact(cluster.start(GREEDY))  # a prefill worker serves it whole


async def test_the_only_worker_needs_force() -> None:
    async with StubCluster(*workers("m0")) as cluster:
        with pytest.raises(Conflict, match="only worker that takes requests"):
            await RoleChanger(cluster.fleet).change("m0", Role.PREFILL)


async def test_a_time_that_is_none_is_refused() -> None:
    async with StubCluster(*workers("m0", "m1")) as cluster:
        with pytest.raises(InvalidRequest, match="m0 refuses: drain_s is negative"):
            await RoleChanger(cluster.fleet).change("m0", Role.PREFILL, drain_s=-1.0)
