"""A client that leaves, stalls or trickles ends its generation at once or in bounded time, and frees its place."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from starlette.types import Message

from pdserve.request import FinishReason
from router.generation import Tokens
from router.http.app import make_app
from router.http.service import Service

COMPLETION = {"model": "tiny", "prompt": "hey"}


def outcomes(service: Service) -> dict[str, float]:
    samples = next(m for m in service.metrics.registry.collect() if m.name == "pdserve_requests").samples
    return {sample.labels["outcome"]: sample.value for sample in samples if sample.name.endswith("_total")}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("script", [[None], [Tokens((39,)), None]], ids=["waiting", "decoding"])
async def test_client_that_leaves_aborts(
    asgi_client: Any, dispatcher: Any, service: Service, script: list[Any], stream: bool
) -> None:
    dispatcher.script = script
    client = asgi_client("/v1/completions", COMPLETION | {"stream": stream})
    async with asyncio.timeout(5):
        task = asyncio.create_task(client.run())
        while not dispatcher.started:
            await asyncio.sleep(0)
        if stream and len(script) > 1:
            await client.wrote.wait()
        client.left.set()
        await dispatcher.started[0].aborted.wait()
        await task
    assert outcomes(service) == {"abort": 1}
    assert all(message.get("more_body", False) for message in client.sent[1:])  # no end that looks like success
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_client_that_leaves_while_sending_reaches_nobody(service: Service, dispatcher: Any) -> None:
    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        raise AssertionError("nobody is there")

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    await make_app(service)(scope, receive, send)
    assert outcomes(service) == {"abort": 1}
    assert dispatcher.started == []


async def test_client_that_does_not_read_is_given_up(asgi_client: Any, dispatcher: Any, service: Service) -> None:
    dispatcher.script = [Tokens((39,)), Tokens((39,)), None]
    client = asgi_client("/v1/completions", COMPLETION | {"stream": True}, write_stall_s=0.05)
    client.reads.clear()
    async with asyncio.timeout(5):
        await client.run()
    assert dispatcher.started[0].aborted.is_set()
    assert outcomes(service) == {"abort": 1}


async def test_connection_that_breaks_under_a_write_aborts(asgi_client: Any, dispatcher: Any) -> None:
    dispatcher.script = [Tokens((39,)), None]
    client = asgi_client("/v1/completions", COMPLETION | {"stream": True})
    client.broken = True
    async with asyncio.timeout(5):
        await client.run()
    assert dispatcher.started[0].aborted.is_set()


async def test_body_that_trickles_is_given_up(service: Service, dispatcher: Any) -> None:
    sent: list[Message] = []

    async def receive() -> Message:
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b" ", "more_body": True}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    hasty = replace(service, limits=replace(service.limits, receipt_s=0.05))
    async with asyncio.timeout(5):
        await make_app(hasty)(scope, receive, send)
    assert sent[0]["status"] == 408
    assert (b"connection", b"close") in sent[0]["headers"]
    assert dispatcher.started == []


async def test_generation_past_its_deadline_ends(
    asgi_client: Any, dispatcher: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the dispatcher forgets it."""
    monkeypatch.setattr("router.http.generate.DEADLINE_GRACE_S", 0.0)
    dispatcher.script = [None]
    client = asgi_client("/v1/completions", COMPLETION, request_s=0.05)
    async with asyncio.timeout(5):
        await client.run()
    assert client.sent[0]["status"] == 504
    assert dispatcher.started[0].aborted.is_set()


async def test_slow_client_lets_tokens_gather(asgi_client: Any, dispatcher: Any) -> None:
    """While a write waits the next tokens are not taken: the front holds none of them."""
    dispatcher.script = [Tokens((39,)), Tokens((72,)), Tokens((0,), FinishReason.LENGTH)]
    client = asgi_client("/v1/completions", COMPLETION | {"stream": True})
    client.reads.clear()
    task = asyncio.create_task(client.run())
    for _ in range(20):
        await asyncio.sleep(0)
    assert dispatcher.started[0].timeline.output_tokens == 1  # the fake makes a token when it is asked for it
    client.reads.set()
    await task
    assert dispatcher.started[0].timeline.output_tokens == 3


async def test_requests_above_the_limit_are_refused_at_once(
    asgi_client: Any, dispatcher: Any, service: Service
) -> None:
    dispatcher.script = [None]
    first = asgi_client("/v1/completions", COMPLETION, in_flight=1)
    second = replace(first, sent=[], left=asyncio.Event())
    async with asyncio.timeout(5):
        task = asyncio.create_task(first.run())
        while not dispatcher.started:
            await asyncio.sleep(0)
        await second.run()
        assert second.sent[0]["status"] == 503
        assert (b"retry-after", b"1") in second.sent[0]["headers"]
        first.left.set()
        await task
        third = replace(first, sent=[], left=asyncio.Event(), _asked=False)
        dispatcher.script = [Tokens((257,), FinishReason.STOP)]
        await third.run()
    assert third.sent[0]["status"] == 200
    assert service.metrics.registry.get_sample_value("pdserve_requests_in_flight") == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_nothing_is_left_of_a_finished_request(asgi_client: Any, dispatcher: Any, stream: bool) -> None:
    """The client stays connected."""
    await asgi_client("/v1/completions", COMPLETION | {"stream": stream}).run()
    assert dispatcher.started[0].aborted.is_set()
    for _ in range(3):  # the cancelled task, and the fake's own generator, end
        await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}
