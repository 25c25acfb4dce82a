"""What the router tells of fleet and queue: decisions, what waits for what, and nothing of a worker that is gone."""

from __future__ import annotations

import asyncio

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

from router.admission_metrics import AdmissionCollector
from router.auto_balance import AutoBalance
from router.bench.stub_worker import Fabric, StubSpec, StubWorker
from router.fleet_metrics import FleetCollector
from router.slo import CLASSES
from tests.router.test_feeder import LONG, PATIENT, fill, mixed, waiting
from tests.support.stub_cluster import DECODE, GREEDY, PREFILL, StubCluster, assert_exact, until


def registry(cluster: StubCluster) -> CollectorRegistry:
    found = CollectorRegistry()
    balance = AutoBalance(cluster.fleet, cluster.dispatcher.account.demand, acts=False)
    found.register(FleetCollector(cluster.fleet, cluster.dispatcher, balance))
    found.register(AdmissionCollector(cluster.dispatcher.feeder))
    return found


def family(found: CollectorRegistry, name: str) -> Metric:
    return next(metric for metric in found.collect() if metric.name == name)


def workers(found: CollectorRegistry) -> set[str]:
    names = ("pdserve_router_backlog_tokens", "pdserve_router_backlog_seconds")
    return {sample.labels["worker"] for name in names for sample in family(found, name).samples}


async def test_a_decision_is_counted_for_each_part_of_a_request() -> None:
    fabric = Fabric()
    stubs = StubWorker(StubSpec("p", PREFILL), fabric), StubWorker(StubSpec("d", DECODE), fabric)
    async with StubCluster(*stubs) as cluster:
        await assert_exact(cluster.start(GREEDY))
        counted = {
            (sample.labels["phase"], sample.labels["outcome"]): sample.value
            for sample in family(registry(cluster), "pdserve_router_decisions").samples
            if sample.name.endswith("_total")
        }
        assert counted == {("prompt", "chosen"): 1, ("decode", "chosen"): 1}


async def test_series_of_a_worker_go_when_it_goes() -> None:
    stubs = [StubWorker(StubSpec(name, PREFILL), Fabric()) for name in ("p0", "p1")]
    async with StubCluster(*stubs) as cluster:
        found = registry(cluster)
        assert workers(found) == {"p0", "p1"}
        await stubs[1].stop()
        await until(lambda: workers(found) == {"p0"})


async def test_the_queue_says_how_much_waits_for_what_and_how_long_one_more_would() -> None:
    worker = mixed()
    async with StubCluster(worker, limits=PATIENT) as cluster:
        found = registry(cluster)

        def wait_s(name: str) -> float:
            return found.get_sample_value("pdserve_queue_predicted_wait_seconds", {"slo_class": name}) or 0.0

        idle_s = wait_s("standard")
        first = await fill(cluster, worker)
        second = cluster.start(GREEDY, prompt_tokens=LONG, first_token=1)
        await waiting(cluster, 1)
        labels = {"slo_class": "standard", "waits_for": "prefill"}
        assert found.get_sample_value("pdserve_queue_requests", labels) == 1
        assert found.get_sample_value("pdserve_queue_tokens", labels) == LONG
        assert found.get_sample_value("pdserve_router_backlog_tokens", {"worker": "m0", "role": "mixed"}) == LONG
        assert idle_s == 0.0
        assert wait_s("standard") > 0.0
        worker.open()
        await asyncio.gather(assert_exact(first), assert_exact(second))
        # What is empty says so: an autoscaler that finds no series does not scale down.
        assert {found.get_sample_value("pdserve_queue_tokens", labels | {"slo_class": name}) for name in CLASSES} == {0}
