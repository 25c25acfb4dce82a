"""Failures after validation: the status table before the first byte, an error event without [DONE] after it."""

from __future__ import annotations

import json
import logging
from typing import Any

import httpx
import pytest

from pdserve.errors import DeadlineExceeded, Overloaded, ServeError, WorkerFailed
from pdserve.request import FinishReason
from router.generation import Tokens

COMPLETION = {"model": "tiny", "prompt": "hey"}
SECRET = "secret of the house"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status"),
    [(WorkerFailed("Workers failed."), 502), (DeadlineExceeded("Too late."), 504), (Overloaded("Full."), 503)],
)
async def test_before_the_first_byte(
    client: httpx.AsyncClient, dispatcher: Any, error: ServeError, status: int, stream: bool
) -> None:
    dispatcher.script = [error]
    response = await client.post("/v1/completions", json=COMPLETION | {"stream": stream})
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    expected = {"message": error.message, "type": error.type, "param": None, "code": error.code}
    assert response.json() == {"error": expected}


async def test_refusal_by_the_dispatcher_says_when_to_retry(client: httpx.AsyncClient, dispatcher: Any) -> None:
    dispatcher.refusal = Overloaded("Full.", retry_after_s=7)
    response = await client.post("/v1/completions", json=COMPLETION)
    assert (response.status_code, response.headers["retry-after"]) == (503, "7")
    assert response.json()["error"]["type"] == "overloaded_error"


async def test_no_worker_yet(client: httpx.AsyncClient, dispatcher: Any, fleet: Any) -> None:
    assert (await client.get("/readyz")).status_code == 200
    fleet.error = Overloaded("No worker has joined yet.")
    ready = await client.get("/readyz")
    assert (ready.status_code, ready.headers["retry-after"]) == (503, "1")
    assert ready.json() == {"status": "not ready", "ready": False, "reason": "no worker", "workers": []}
    assert (await client.post("/v1/completions", json=COMPLETION)).status_code == 503
    assert (await client.get("/livez")).status_code == 200
    assert dispatcher.started == []


async def test_after_the_first_byte(client: httpx.AsyncClient, dispatcher: Any) -> None:
    dispatcher.script = [Tokens((39,)), WorkerFailed("Workers failed.")]
    headers = {"x-request-id": "mine"}
    response = await client.post("/v1/completions", json=COMPLETION | {"stream": True}, headers=headers)
    assert response.status_code == 200
    events = response.text.split("\n\n")
    assert json.loads(events[-2].removeprefix("data: ")) == {
        "error": {
            "message": "Workers failed.",
            "type": "server_error",
            "param": None,
            "code": "worker_failed",
            "request_id": "mine",
        }
    }
    assert len(events) == 3
    assert "[DONE]" not in response.text


@pytest.mark.parametrize("stream", [False, True])
async def test_bug_shows_nothing_and_is_logged(
    client: httpx.AsyncClient, dispatcher: Any, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    dispatcher.script = [Tokens((39,)), RuntimeError(SECRET)]
    body, headers = COMPLETION | {"stream": stream}, {"x-request-id": "mine"}
    response = await client.post("/v1/completions", json=body, headers=headers)
    assert response.status_code == (200 if stream else 500)
    assert SECRET not in response.text
    assert "The server had an error" in response.text
    assert any("request_id=mine" in record.getMessage() and record.exc_info for record in caplog.records)


async def test_bug_outside_the_generating_endpoints(client: httpx.AsyncClient, fleet: Any) -> None:
    fleet.error = RuntimeError(SECRET)
    client._transport.raise_app_exceptions = False  # type: ignore[attr-defined]
    response = await client.get("/readyz")
    assert response.status_code == 500
    assert SECRET not in response.text
    assert response.headers["x-request-id"]


@pytest.mark.parametrize(
    "script", [[Tokens((39,), FinishReason.ABORT)], [Tokens((39,), FinishReason.ERROR)], [Tokens((39,))]]
)
async def test_generation_that_ends_badly_is_no_success(
    client: httpx.AsyncClient, dispatcher: Any, script: list[Tokens]
) -> None:
    dispatcher.script = script
    assert (await client.post("/v1/completions", json=COMPLETION)).status_code in (500, 502)
    stream = await client.post("/v1/completions", json=COMPLETION | {"stream": True})
    assert "[DONE]" not in stream.text


@pytest.mark.parametrize("given", ["mine", "a b/c:~", "x" * 128])
async def test_request_id_is_returned(client: httpx.AsyncClient, given: str) -> None:
    for path in ("/livez", "/nowhere"):
        assert (await client.get(path, headers={"x-request-id": given})).headers["x-request-id"] == given


@pytest.mark.parametrize("given", [b"", b"x" * 129, "é".encode(), b"a\tb"])
async def test_odd_request_id_is_replaced(client: httpx.AsyncClient, given: bytes) -> None:
    got = (await client.get("/livez", headers=[(b"x-request-id", given)])).headers["x-request-id"]
    assert got.startswith("req-")
    assert len(got) == 36


async def test_no_text_reaches_the_log(
    client: httpx.AsyncClient, dispatcher: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    dispatcher.script = [RuntimeError("bug")]
    body = {"model": "tiny", "messages": [{"role": "user", "content": SECRET}]}
    await client.post("/v1/chat/completions", json=body)
    await client.post("/v1/chat/completions", json=body | {"temperature": SECRET, "stop": [SECRET] * 99})
    assert SECRET not in caplog.text
