"""The router follows the nodes that its workers name, begins anew after a gap or a restart, and does without them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from kvstore.keys import BlockKey, block_keys
from kvstore.store import store_pb2
from kvstore.store.store_pb2_grpc import StorePeerServicer, add_StorePeerServicer_to_server
from kvstore.store.tier import Tier
from pdserve.protocol import worker_pb2 as pb
from router.bench.stub_worker import Fabric, StubSpec, StubWorker
from router.explain import Explainer
from tests.support.stub_cluster import GREEDY, MIXED, StubCluster, assert_exact, until

Event = store_pb2.KvEvent


class FakeNode(StorePeerServicer):
    """Tells what the test puts into `events`; each subscription begins with a snapshot of `held`."""

    def __init__(self) -> None:
        self.incarnation = 5
        self.held: list[BlockKey] = []
        self.events: list[asyncio.Queue[Event]] = []

    async def start(self) -> str:
        self._server = grpc.aio.server(options=[("grpc.http2.min_ping_interval_without_data_ms", 500)])
        add_StorePeerServicer_to_server(self, self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return f"127.0.0.1:{port}"

    async def stop(self) -> None:
        await self._server.stop(None)

    async def Watch(self, request: store_pb2.WatchRequest, context: Any) -> AsyncIterator[Event]:
        if request.incarnation != self.incarnation:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "another life")
        events: asyncio.Queue[Event] = asyncio.Queue()
        self.events.append(events)
        yield Event(sequence=9, kind=Event.STORED, tier=Tier.DISK, keys=b"".join(self.held))
        yield Event(sequence=9, kind=Event.SNAPSHOT_END)
        while True:
            yield await events.get()


@pytest.fixture
async def node() -> AsyncIterator[FakeNode]:
    node = FakeNode()
    node.address = await node.start()  # type: ignore[attr-defined]
    yield node
    await node.stop()


def attach(worker: StubWorker, address: str, incarnation: int) -> None:
    for session in worker.sessions:
        session.send(store=pb.StoreReport(address=address, incarnation=incarnation))


def blocks(cluster: StubCluster) -> int:
    return len(cluster.fleet.stores.index)


async def test_what_only_the_store_holds_is_explained_with_its_tier(node: FakeNode) -> None:
    worker = StubWorker(StubSpec("m0", MIXED, has_store=True), Fabric())
    async with StubCluster(worker, policy="cost") as cluster:
        request = cluster.request(GREEDY, prompt_tokens=65)
        node.held = block_keys(cluster.fleet.root_key(b""), request.prompt_token_ids, 16)
        attach(worker, node.address, 5)  # type: ignore[attr-defined]
        await until(lambda: blocks(cluster) == 4)
        for session in worker.sessions:
            session.send(load=pb.LoadReport(free_blocks=9, total_blocks=9))
        generation = cluster.start(GREEDY, prompt_tokens=65)
        await assert_exact(generation)
        record = Explainer(cluster.fleet, cluster.dispatcher).explain(generation.request.request_id)
        assert record is not None
        [decision] = record["decisions"]
        assert (decision["hit_blocks"], decision["fetched_blocks"], decision["reachable_blocks"]) == (0, 4, 4)
        [candidate] = decision["candidates"]
        assert candidate["fetch"] == {"blocks": 4, "tier": "disk", "seconds": candidate["terms_s"]["fetch"]}
        assert candidate["uncached_tokens"] == 1
        # The stub found nothing: what was promised in vain is counted.
        assert Explainer(cluster.fleet, cluster.dispatcher).slo()["store_drift"]["false_hit_ratio"] == 1.0


async def test_a_gap_and_a_new_life_bring_a_new_snapshot(node: FakeNode) -> None:
    worker = StubWorker(StubSpec("m0", MIXED), Fabric())
    async with StubCluster(worker) as cluster:
        node.held = [BlockKey(bytes([n]) * 16) for n in range(3)]
        attach(worker, node.address, 5)  # type: ignore[attr-defined]
        await until(lambda: blocks(cluster) == 3)
        node.events[-1].put_nowait(Event(sequence=10, kind=Event.REMOVED, tier=Tier.DISK, keys=node.held.pop()))
        await until(lambda: blocks(cluster) == 2)
        node.held.append(BlockKey(b"y" * 16))
        node.events[-1].put_nowait(Event(sequence=12, kind=Event.STORED, tier=Tier.HOST, keys=b"x" * 16))
        await until(lambda: blocks(cluster) == 3)
        node.incarnation = 6
        node.events[-1].put_nowait(Event(sequence=1, kind=Event.STORED, tier=77, keys=b"x"))  # nonsense ends it too
        node.events[-1].put_nowait(Event(sequence=10, kind=Event.STORED, tier=77, keys=b"x"))
        await until(lambda: blocks(cluster) == 0)
        attach(worker, node.address, 6)  # type: ignore[attr-defined]
        await until(lambda: blocks(cluster) == 3)
        attach(worker, "", 0)
        await until(lambda: blocks(cluster) == 0)
        await assert_exact(cluster.start(GREEDY))


async def test_a_node_that_is_not_reached_changes_nothing(node: FakeNode) -> None:
    worker = StubWorker(StubSpec("m0", MIXED), Fabric())
    async with StubCluster(worker) as cluster:
        await node.stop()
        attach(worker, node.address, 5)  # type: ignore[attr-defined]
        await until(lambda: cluster.fleet.stores.resyncs >= 2)
        await assert_exact(cluster.start(GREEDY))
        await worker.stop()
        await until(lambda: not cluster.fleet.stores._watched)
