"""The load that asks a stub worker by its own protocol gets an answer to each request."""

from __future__ import annotations

from pdserve.protocol import worker_pb2 as pb
from router.bench.session_load import ask
from router.bench.stub_worker import Fabric, StubSpec, StubWorker


async def test_each_request_is_answered() -> None:
    worker = StubWorker(StubSpec("stub", pb.MIXED), Fabric())
    address = await worker.start()
    found = await ask(address, requests=20, rate=1000.0)
    await worker.stop()
    assert len(worker.submits) == 20
    assert 0 < found["p50_us"] <= found["p99_us"]
