"""A drained worker gets nothing new and finishes what it has; pools come from the workers' own ledgers."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import httpx
import pytest

from pdserve.errors import Conflict
from router.bench.stub_worker import Fabric, StubSpec, StubWorker
from router.http.access import Access
from router.http.app import make_app
from router.http.service import RoleName, Service
from router.http.trust import Trust
from router.operations import Operations
from tests.support.stub_cluster import DECODE, GREEDY, MIXED, PREFILL, StubCluster, assert_exact, until


async def test_a_drained_worker_gets_nothing_new_until_it_is_used_again() -> None:
    stubs = [StubWorker(StubSpec(name, MIXED), Fabric()) for name in ("m0", "m1")]
    async with StubCluster(*stubs) as cluster:
        operations = Operations(cluster.fleet)
        assert operations.drain("m0", True)
        assert {each["worker_id"]: each["state"] for each in cluster.fleet.topology()["workers"]} == {
            "m0": "drained",
            "m1": "ready",
        }
        for _ in range(4):
            await assert_exact(generation := cluster.start(GREEDY))
            assert generation.workers == ["m1"]
        assert operations.drain("m0", False)
        started = [cluster.start(GREEDY, first_token=number) for number in range(4)]
        for generation in started:
            await assert_exact(generation)
        assert {worker for generation in started for worker in generation.workers} == {"m0", "m1"}
        assert not operations.drain("nobody", True)


async def test_what_a_worker_has_goes_on_while_it_drains() -> None:
    worker = StubWorker(StubSpec("m0", MIXED, token_s=0.02), Fabric())
    async with StubCluster(worker, StubWorker(StubSpec("m1", MIXED), Fabric())) as cluster:
        started = [cluster.start(GREEDY, first_token=number) for number in range(2)]
        await until(lambda: all(each.workers for each in started))
        (running,) = (each for each in started if each.workers == ["m0"])
        Operations(cluster.fleet).drain("m0", True)
        for each in started:
            await assert_exact(each)
        assert running.workers == ["m0"]


async def test_prefill_goes_on_alone_when_decode_is_drained() -> None:
    fabric = Fabric()
    stubs = StubWorker(StubSpec("p", PREFILL), fabric), StubWorker(StubSpec("d", DECODE), fabric)
    async with StubCluster(*stubs) as cluster:
        await until(lambda: cluster.fleet.ready)
        Operations(cluster.fleet).drain("d", True)
        await assert_exact(generation := cluster.start(GREEDY))
        assert generation.workers == ["p"]
        assert cluster.fleet.ready


async def test_a_worker_whose_admin_port_is_silent_is_told_as_such() -> None:
    async with StubCluster(StubWorker(StubSpec("m0", MIXED), Fabric())) as cluster:
        (found,) = (await Operations(cluster.fleet).pools())["workers"]
        assert found["worker_id"] == "m0"
        assert found["by_state"] == {}
        assert "admin port" in found["error"]


class FakeOperations:
    def __init__(self) -> None:
        self.drained: dict[str, bool] = {}
        self.error: Exception | None = None

    async def pools(self) -> dict[str, Any]:
        return {"workers": []}

    def drain(self, worker_id: str, drained: bool) -> bool:
        self.drained[worker_id] = drained
        return worker_id == "w"

    async def change_role(self, worker_id: str, role: RoleName, *, drain_s: float, force: bool) -> dict[str, Any]:
        if self.error is not None:
            raise self.error
        return {"worker_id": worker_id, "asked": [role, drain_s, force]}


@pytest.fixture
def operations() -> FakeOperations:
    return FakeOperations()


def client_of(service: Service, operations: FakeOperations, host: str, key: bytes | None) -> httpx.AsyncClient:
    app = make_app(replace(service, operations=operations, access=Access(Trust(key))))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, client=(host, 1)), base_url="http://front")


PATH = "/admin/workers/w/drain"
KEY = {"x-pdserve-admin-key": "secret"}


async def test_draining_takes_the_admin_key(service: Service, operations: FakeOperations) -> None:
    async with client_of(service, operations, "127.0.0.1", b"secret") as client:
        for headers in ({}, {"x-pdserve-admin-key": "wrong"}, KEY | {"origin": "http://elsewhere"}):
            refused = await client.post(PATH, headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
            assert (await client.get("/admin", headers=headers)).json() == {"trusted": False}
        assert not operations.drained
        assert (await client.get("/admin", headers=KEY | {"origin": "http://front"})).json() == {"trusted": True}
        assert (await client.post(PATH, headers=KEY)).json() == {"worker_id": "w", "drained": True}
        assert (await client.delete(PATH, headers=KEY)).json() == {"worker_id": "w", "drained": False}
        missing = await client.post("/admin/workers/x/drain", headers=KEY)
        assert (missing.status_code, json.loads(missing.content)["error"]["code"]) == (404, "unknown_worker")


@pytest.mark.parametrize(("host", "status"), [("127.0.0.1", 200), ("10.0.0.7", 403)])
async def test_without_a_key_only_this_machine_may(
    service: Service, operations: FakeOperations, host: str, status: int
) -> None:
    async with client_of(service, operations, host, None) as client:
        assert (await client.post(PATH)).status_code == status
        assert (await client.get("/v1/pools")).json() == {"workers": []}


async def test_a_role_is_changed_by_operators_only(service: Service, operations: FakeOperations) -> None:
    async with client_of(service, operations, "127.0.0.1", b"secret") as client:
        assert (await client.post("/admin/workers/w0/role", json={"role": "decode"})).status_code == 403
        client.headers["x-pdserve-admin-key"] = "secret"
        answer = await client.post("/admin/workers/w0/role", json={"role": "decode"})
        assert answer.json() == {"worker_id": "w0", "asked": ["decode", 30.0, False]}
        answer = await client.post("/admin/workers/w0/role", json={"role": "mixed", "drain_s": 1, "force": True})
        assert answer.json()["asked"] == ["mixed", 1.0, True]
        for wrong in ({}, {"role": "both"}, {"role": "decode", "drain": 1}, {"role": "decode", "drain_s": "x"}, [1]):
            assert (await client.post("/admin/workers/w0/role", json=wrong)).status_code == 400
        wrong = await client.post("/admin/workers/w0/role", json={"role": "both"})
        assert wrong.json()["error"]["param"] == "role"
        assert "'prefill', 'decode' or 'mixed'" in wrong.json()["error"]["message"]
        operations.error = Conflict("w0 is the last one.", code="last_of_role")
        refused = await client.post("/admin/workers/w0/role", json={"role": "decode"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "last_of_role")
        assert (await client.get("/admin/workers/w0/role")).status_code == 405
