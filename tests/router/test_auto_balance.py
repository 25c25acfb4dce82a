"""The fleet's own figures become advice that `GET /v1/topology` shows; it is acted on only when told to."""

from __future__ import annotations

import pytest

from router.auto_balance import AutoBalance
from router.balance import HOLD_S
from router.bench.stub_worker import Fabric, StubSpec, StubWorker
from router.demand import DemandMeter
from router.explain import Explainer
from router.policy import Role
from tests.support.stub_cluster import DECODE, PREFILL, StubCluster, until


def workers() -> list[StubWorker]:
    fabric = Fabric()
    names = {"p0": PREFILL, "d0": DECODE, "d1": DECODE, "d2": DECODE}
    return [StubWorker(StubSpec(name, role), fabric) for name, role in names.items()]


def long_prompts() -> DemandMeter:
    """Five a second of 4,000 tokens, which one prefill worker cannot compute."""
    meter = DemandMeter()
    for number in range(500):
        meter.arrived(0.2 * number)
        meter.ended(0.2 * number, 4000, 20, 4010, 4.0, 0.25)
    return meter


@pytest.mark.parametrize("acts", [False, True])
async def test_ripe_advice_is_followed_only_when_told_to(acts: bool) -> None:
    async with StubCluster(*workers()) as cluster:
        p0 = cluster.fleet.member("p0")
        assert p0 is not None
        p0.learner.note_prefill(4000, 0.4)
        balance = AutoBalance(cluster.fleet, long_prompts(), acts=acts)
        await balance.look(100.0)
        assert balance.advice is not None
        assert (balance.advice.from_role, balance.advice.to_role) == (Role.DECODE, Role.PREFILL)
        assert not balance.advice.ripe
        explained = Explainer(cluster.fleet, cluster.dispatcher, balance).pairs()["balance"]
        assert (explained["acts"], explained["advice"]["worker_id"]) == (acts, "d0")
        assert explained["advice"]["gain"] > 0.1
        await balance.look(100.0 + HOLD_S)
        assert balance.advice is not None
        assert balance.advice.ripe
        if not acts:
            assert not cluster.fleet.role_changes
            return
        await until(lambda: cluster.fleet.role_changes == {("decode", "prefill"): 1})
        await until(lambda: all(member.next_role is None for member in cluster.members()))
        await balance.look(100.0 + 2 * HOLD_S)
        assert balance.advice is None or not balance.advice.ripe  # what the change brings is seen first


async def test_nothing_is_advised_while_a_worker_drains_or_little_is_known() -> None:
    async with StubCluster(*workers()) as cluster:
        balance = AutoBalance(cluster.fleet, DemandMeter(), acts=True)
        await balance.look(100.0)
        assert balance.advice is None
        assert balance.describe() == {"acts": True, "demand_rps": None, "capacity_rps": None, "advice": None}
        balance = AutoBalance(cluster.fleet, long_prompts(), acts=True)
        d0 = cluster.fleet.member("d0")
        assert d0 is not None
        d0.next_role = Role.MIXED
        await balance.look(100.0)
        assert balance.advice is None
        d0.next_role = None
