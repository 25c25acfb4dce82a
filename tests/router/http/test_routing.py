"""The endpoints about choices pass on what the brain says, and headers carry a client's wishes in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import httpx
import pytest

from pdserve.errors import Overloaded
from pdserve.request import FinishReason, Request
from router.generation import Tokens
from router.http.app import make_app
from router.http.service import Service
from router.wishes import Wishes

SCRIPT = [Tokens((39,)), Tokens((), FinishReason.LENGTH)]
BODY = {"model": "tiny", "prompt": "hey"}


class FakeRouting:
    def __init__(self) -> None:
        self.asked: list[tuple[Request, Wishes]] = []
        self.error: Exception | None = None

    def explain(self, request_id: str, tenant: str | None) -> dict[str, Any] | None:
        return {"request_id": request_id} if request_id in ("known", "a/b c") else None

    def decision_header(self, request_id: str) -> str | None:
        return "policy=cost; worker=w"

    def dry_run(self, request: Request, wishes: Wishes) -> dict[str, Any]:
        if self.error is not None:
            raise self.error
        self.asked.append((request, wishes))
        return {"chosen": "w"}

    def slo(self) -> dict[str, Any]:
        return {"classes": {}}

    def pairs(self) -> dict[str, Any]:
        return {"pairs": []}


@pytest.fixture
def routing() -> FakeRouting:
    return FakeRouting()


@pytest.fixture
def asking(service: Service, routing: FakeRouting) -> httpx.AsyncClient:
    app = make_app(replace(service, routing=routing))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


async def test_explain(asking: httpx.AsyncClient) -> None:
    assert (await asking.get("/v1/requests/known/explain")).json() == {"request_id": "known"}
    assert (await asking.get("/v1/requests/a%2Fb%20c/explain")).json() == {"request_id": "a/b c"}
    missing = await asking.get("/v1/requests/other/explain")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "unknown_request"


async def test_slo_and_topology(asking: httpx.AsyncClient) -> None:
    assert (await asking.get("/v1/slo")).json() == {"classes": {}}
    assert (await asking.get("/v1/topology")).json() == {"pairs": []}


@pytest.mark.parametrize(
    "body",
    [BODY, {"model": "tiny", "messages": [{"role": "user", "content": "hey"}]}, {"model": "tiny", "input": "hey"}],
)
async def test_a_dry_run_takes_what_a_request_takes(
    asking: httpx.AsyncClient, routing: FakeRouting, dispatcher: Any, body: dict[str, Any]
) -> None:
    response = await asking.post("/v1/route:dryrun", json=body, headers={"x-pdserve-policy": "random"})
    assert response.json() == {"chosen": "w"}
    [(request, wishes)] = routing.asked
    assert len(request.prompt_token_ids) >= 3
    assert wishes.policy == "random"
    assert not dispatcher.started


async def test_a_dry_run_fails_as_a_request_fails(asking: httpx.AsyncClient, routing: FakeRouting) -> None:
    assert (await asking.post("/v1/route:dryrun", content=b"{")).status_code == 400
    assert (await asking.post("/v1/route:dryrun", json={"model": "other", "prompt": "x"})).status_code == 404
    routing.error = Overloaded("No worker is connected yet.")
    assert (await asking.post("/v1/route:dryrun", json=BODY)).status_code == 503


@pytest.mark.parametrize("stream", [False, True])
async def test_the_response_names_the_decision(asking: httpx.AsyncClient, dispatcher: Any, stream: bool) -> None:
    dispatcher.script = SCRIPT
    response = await asking.post("/v1/completions", json=BODY | {"stream": stream})
    assert response.headers["x-pdserve-decision"] == "policy=cost; worker=w"


@pytest.mark.parametrize("header", ["x-pdserve-policy", "x-pdserve-slo"])
async def test_a_wish_that_does_not_exist_is_refused(asking: httpx.AsyncClient, dispatcher: Any, header: str) -> None:
    dispatcher.script = SCRIPT
    response = await asking.post("/v1/completions", json=BODY, headers={header: "fastest"})
    assert response.status_code == 400
    assert not dispatcher.started
