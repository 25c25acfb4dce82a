"""With a tenants' file nothing is open but what is named; each tenant sees its own, and keys never leave."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from kvstore.keys import root_key
from pdserve.errors import ConfigError, Overloaded
from pdserve.request import Request
from pdserve.tenants import TenantsFile, add_key
from router.http.access import Access
from router.http.app import Entrance, make_app
from router.http.service import Service
from router.http.trust import Trust
from router.wishes import Wishes
from tests.router.http.conftest import FakeFleet
from tests.router.http.test_operations import FakeOperations

ADMIN = b"admin-secret"
OPEN = {
    "/livez",
    "/readyz",
    "/ping",
    "/health",
    "/version",
    "/openapi.json",
    "/docs",
    "/",
    "/console/{name:path}",
    "/admin",
}
BODY = {"model": "tiny", "prompt": "hey", "max_tokens": 8}

Connect = Callable[..., Any]


class Routing:
    """Tells whose records were asked for."""

    def explain(self, request_id: str, tenant: str | None) -> dict[str, Any] | None:
        return {"asked_by": tenant} if request_id == "known" else None

    def recent(self, limit: int, tenant: str | None) -> list[dict[str, Any]]:
        return [{"asked_by": tenant}]

    def decision_header(self, request_id: str) -> str | None:
        return None

    def dry_run(self, request: Request, wishes: Wishes) -> dict[str, Any]:
        return {"tenant": wishes.tenant, "slo": wishes.slo.name, "root": request.root_key.hex()}

    def slo(self) -> dict[str, Any]:
        return {}

    def pairs(self) -> dict[str, Any]:
        return {}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tenants.toml"


@pytest.fixture
def key(path: Path) -> str:
    return add_key(path, "acme")


@pytest.fixture
def app(service: Service, path: Path, key: str) -> Entrance:
    access = Access(Trust(ADMIN), TenantsFile(path), lambda: 0.0)
    made = make_app(replace(service, routing=Routing(), operations=FakeOperations(), access=access))
    assert isinstance(made, Entrance)
    return made


@pytest.fixture
def connect(app: Entrance) -> Connect:
    """A client with a bearer's token, on this machine: that alone must open nothing."""

    @asynccontextmanager
    async def client(token: str | None = None) -> AsyncIterator[httpx.AsyncClient]:
        headers = {"authorization": f"Bearer {token}"} if token is not None else {}
        transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://front", headers=headers) as made:
            yield made

    return client


def routes(app: Entrance) -> list[tuple[str, str]]:
    inner = app._app
    assert isinstance(inner, Starlette)
    found = [
        (method, route.path)
        for route in inner.routes
        if isinstance(route, Route)
        for method in route.methods or {"POST"}
        if method != "HEAD"
    ]
    assert len(found) > 20
    return found


@pytest.mark.parametrize("token", [None, "", "pds_00000000_" + "a" * 43, "sk-something", "é"])
async def test_every_route_but_those_named_wants_a_key(app: Entrance, connect: Connect, token: str | None) -> None:
    async with connect() as client:
        headers = {"authorization": f"Bearer {token}".encode()} if token is not None else {}
        for method, path in [
            *routes(app),
            ("GET", "/nowhere"),
            ("GET", "http://front//metrics"),
            ("GET", "/%2e/metrics"),
        ]:
            response = await client.request(method, path, json=BODY, headers=headers)
            if path in OPEN:
                assert response.status_code in (200, 404, 503), path
            else:
                admin = path.startswith("/admin/")
                assert response.status_code == (403 if admin else 401), path
                assert response.headers["x-request-id"]
                assert response.json()["error"]["code"] == ("forbidden" if admin else "invalid_api_key")
                assert response.headers.get("www-authenticate") == (None if admin else "Bearer")


async def test_only_operators_are_told_who_is_missing(fleet: FakeFleet, connect: Connect, key: str) -> None:
    fleet.error = Overloaded("No worker.")
    for token, told in ((None, False), (key, False), (ADMIN.decode(), True)):
        async with connect(token) as client:
            response = await client.get("/readyz")
        assert response.status_code == 503
        assert ("workers" in response.json()) == told
        assert response.json()["reason"] == "no worker"


async def test_a_tenant_may_generate_but_not_see_what_is_about_all(key: str, connect: Connect) -> None:
    async with connect(key) as client:
        assert (await client.post("/v1/completions", json=BODY)).status_code == 200
        assert (await client.get("/v1/models")).status_code == 200
        for path in ("/metrics", "/workers", "/v1/slo", "/v1/topology", "/admin/anything"):
            assert (await client.get(path)).status_code == 403, path


async def test_the_admin_key_opens_all_in_both_headers(connect: Connect) -> None:
    async with connect(ADMIN.decode()) as client:
        for path in ("/metrics", "/workers", "/v1/slo", "/v1/topology", "/v1/models"):
            assert (await client.get(path)).status_code == 200, path
        assert (await client.post("/v1/completions", json=BODY)).status_code == 200
    async with connect() as client:
        headers = {"x-pdserve-admin-key": ADMIN.decode()}
        assert (await client.get("/metrics", headers=headers)).status_code == 200
        assert (await client.get("/metrics", headers={"x-pdserve-admin-key": "wrong"})).status_code == 401


async def test_records_are_shown_to_their_tenant_and_to_operators(key: str, connect: Connect) -> None:
    for token, asked_by in ((key, "acme"), (ADMIN.decode(), None)):
        async with connect(token) as client:
            assert (await client.get("/v1/requests")).json()["data"] == [{"asked_by": asked_by}]
            assert (await client.get("/v1/requests/known/explain")).json() == {"asked_by": asked_by}


async def test_a_tenants_turns_class_and_keys_are_its_own(path: Path, connect: Connect, key: str) -> None:
    path.write_text(path.read_text().replace("[[", '[tenants.acme]\nslo = "batch"\n\n[[', 1))
    other = add_key(path, "beta")
    roots = {}
    for token, name, slo in ((key, "acme", "batch"), (other, "beta", "standard")):
        async with connect(token) as client:
            answers = [
                (await client.post("/v1/route:dryrun", json={**BODY, **extra})).json()
                for extra in ({}, {"cache_salt": "x"}, {"cache_salt": "y"}, {})
            ]
            assert {(each["tenant"], each["slo"]) for each in answers} == {(name, slo)}
            roots[name] = [each["root"] for each in answers]
            assert roots[name][0] == roots[name][3]
            named = await client.post("/v1/route:dryrun", json=BODY, headers={"x-pdserve-slo": "interactive"})
            assert named.json()["slo"] == "interactive"
    assert len({*roots["acme"], *roots["beta"]}) == 6


async def test_without_tenants_a_salt_narrows_and_nothing_else_does(service: Service) -> None:
    app = make_app(replace(service, routing=Routing()))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front") as client:
        roots = [
            (await client.post("/v1/route:dryrun", json={**BODY, **extra}, headers=headers)).json()["root"]
            for extra, headers in (
                ({}, {}),
                ({}, {"authorization": "Bearer abc"}),
                ({"cache_salt": "x"}, {}),
                ({"cache_salt": "x"}, {"authorization": "Bearer abc"}),
            )
        ]
    assert roots[0] == roots[1] == root_key(b"fingerprint").hex()
    assert roots[2] == roots[3] != roots[0]


@pytest.mark.parametrize(("salt", "status"), [("", 400), ("x" * 256, 200), ("x" * 257, 400), (5, 400)])
async def test_salts_have_a_length(client: httpx.AsyncClient, salt: object, status: int) -> None:
    assert (await client.post("/v1/completions", json={**BODY, "cache_salt": salt})).status_code == status


async def test_limits_are_answered_with_429_and_when_to_come_back(path: Path, connect: Connect, key: str) -> None:
    path.write_text(path.read_text().replace("[[", "[tenants.acme]\nrequests_per_minute = 2\n\n[[", 1))
    async with connect(key) as client:
        statuses = [(await client.post("/v1/completions", json=BODY)).status_code for _ in range(2)]
        refused = await client.post("/v1/completions", json=BODY)
    assert statuses == [200, 200]
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    assert refused.json()["error"]["type"] == "rate_limit_error"


async def test_a_bad_request_uses_up_nothing(path: Path, connect: Connect, key: str) -> None:
    path.write_text(path.read_text().replace("[[", "[tenants.acme]\nconcurrent_requests = 1\n\n[[", 1))
    async with connect(key) as client:
        for _ in range(3):
            assert (await client.post("/v1/completions", json={**BODY, "n": 99})).status_code == 400
            assert (await client.post("/v1/completions", json={**BODY, "stream": True})).status_code == 200


async def test_refusals_are_logged_without_what_was_sent(connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        async with connect("pds_00000000_canary-" + "a" * 36) as client:
            await client.post("/v1/completions?key=canary", json={"prompt": "canary"})
    refusals = [record for record in caplog.records if record.name == "pdserve.audit"]
    assert len(refusals) == 1
    assert "status=401 path='/v1/completions' client=127.0.0.1" in refusals[0].getMessage()
    assert "canary" not in caplog.text.replace(str(httpx.URL("http://front/v1/completions?key=canary")), "")


def test_tenants_need_an_admin_key(path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match="--admin-key-file"):
        Access(Trust(), TenantsFile(path))
