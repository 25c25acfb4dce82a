"""The load client reads whole and streamed answers to their end and no further, from the stub it is measured with."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import pytest

from router.bench.http_load import Load
from router.bench.http_stub import StubServer
from tests.support.stub_cluster import until


class Counted(StubServer):
    """Knows how many connections there are."""

    connections = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        Counted.connections += 1

    def connection_lost(self, exc: Exception | None) -> None:
        Counted.connections -= 1


@contextlib.asynccontextmanager
async def loaded(**fields: object) -> AsyncIterator[Load]:
    server = await asyncio.get_running_loop().create_server(Counted, "127.0.0.1", 0)
    async with server:
        load = Load(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", request(**fields))
        try:
            yield load
        finally:
            load.close()
            await until(lambda: Counted.connections == 0)


def request(**fields: object) -> bytes:
    body = json.dumps({"model": "stub", **fields}).encode()
    return f"POST /v1/completions HTTP/1.1\r\nhost: stub\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


async def test_streams_are_read_event_by_event_over_the_same_connections() -> None:
    async with loaded(max_tokens=7, stream=True) as load:
        await load.closed_loop(requests=12, connections=3)
        assert len(load.took_s) == 12
        assert load.events == 12 * 7


async def test_whole_answers_at_a_rate() -> None:
    async with loaded(max_tokens=7) as load:
        await load.open_loop(requests=20, rate=400.0)
        assert len(load.took_s) == 20
        assert load.events == 0


async def test_a_refusal_is_counted_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.bench.http_stub._WHOLE", b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n")
    async with loaded() as load:
        await load.closed_loop(requests=2, connections=1)
        assert (load.refused, load.took_s) == (2, [])


async def test_an_error_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.bench.http_stub._WHOLE", b"HTTP/1.1 500 Bug\r\ncontent-length: 0\r\n\r\n")
    async with loaded() as load:
        with pytest.raises(RuntimeError, match="500"):
            await load.closed_loop(requests=1, connections=1)
