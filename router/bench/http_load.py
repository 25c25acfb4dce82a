"""A load client of little cost of its own: `python -m router.bench.http_load ADDRESS BODY`, JSON out.

Connections are kept open, and an answer is read only as far as it takes to see its end. With a rate, requests begin at
even times whatever became of the others and their time counts from there; without, each connection sends its next
request when it has its answer.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import deque
from typing import Annotated, cast

import typer
import uvloop

_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_LIMIT_S = 120.0
_CHUNKED = 1 << 62  # bytes left of a body whose end is a chunk of none


class Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self.answered: asyncio.Future[bytes] | None = None
        self._transport: asyncio.Transport | None = None
        self._parts: list[bytes] = []
        self._left: int | None = None  # bytes of the body still to come; None before its head is there

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name

    def data_received(self, data: bytes) -> None:
        self._parts.append(data)
        if self.answered is not None and self._complete(data):
            self.answered.set_result(b"".join(self._parts))
            self.answered = None

    def connection_lost(self, exc: Exception | None) -> None:
        if self.answered is not None:
            self.answered.set_exception(ConnectionError("the connection was closed"))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def _complete(self, data: bytes) -> bool:
        if self._left is None:
            head, blank, body = b"".join(self._parts).partition(b"\r\n\r\n")
            if not blank:
                return False
            length = _LENGTH.search(head)
            self._left = int(length[1]) if length is not None else _CHUNKED
            data = body
        if self._left == _CHUNKED:
            return data.endswith(b"0\r\n\r\n")
        self._left -= len(data)
        return self._left <= 0

    async def ask(self, request: bytes) -> bytes:
        assert self._transport is not None
        self._parts.clear()
        self._left = None
        self.answered = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self.answered


class Load:
    def __init__(self, address: str, request: bytes) -> None:
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self._request = request
        self._all: list[Connection] = []
        self._free: deque[Connection] = deque()
        self.took_s: list[float] = []
        self.events = 0
        self.refused = 0  # 429 and 503: beyond what the server takes

    async def one(self, began_s: float) -> None:
        connection = self._free.popleft() if self._free else await self._open()
        answer = await connection.ask(self._request)
        self._free.append(connection)
        if answer.startswith((b"HTTP/1.1 429", b"HTTP/1.1 503")):
            self.refused += 1
            return
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(answer[:400].decode("latin-1"))
        self.took_s.append(time.perf_counter() - began_s)
        self.events += answer.count(b"data: {")

    async def _open(self) -> Connection:
        _, connection = await asyncio.get_running_loop().create_connection(Connection, self._host, self._port)
        self._all.append(connection)
        return connection

    def close(self) -> None:
        for connection in self._all:
            connection.close()

    async def closed_loop(self, requests: int, connections: int) -> None:
        async def client() -> None:
            for _ in range(requests // connections):
                await self.one(time.perf_counter())

        await asyncio.gather(*(client() for _ in range(connections)))

    async def open_loop(self, requests: int, rate: float) -> None:
        start_s = time.perf_counter()
        tasks = []
        for number in range(requests):
            due_s = start_s + number / rate
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            tasks.append(asyncio.create_task(self.one(due_s)))
        await asyncio.gather(*tasks)


async def _run(address: str, body: str, requests: int, connections: int, rate: float) -> dict[str, float]:
    data = body.encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\n"
    request = f"{head}content-length: {len(data)}\r\n\r\n".encode() + data
    warm = Load(address, request)
    await warm.closed_loop(connections, min(connections, 4))
    warm.close()
    load = Load(address, request)
    began_s = time.perf_counter()
    async with asyncio.timeout(_LIMIT_S):
        await (load.open_loop(requests, rate) if rate else load.closed_loop(requests, connections))
    wall_s = time.perf_counter() - began_s
    load.close()
    took_s = sorted(load.took_s)
    return {
        "p50_us": round(took_s[len(took_s) // 2] * 1e6),
        "p99_us": round(took_s[len(took_s) * 99 // 100] * 1e6),
        "requests_per_s": round(len(took_s) / wall_s, 1),
        "events_per_s": round(load.events / wall_s),
        "refused": load.refused,
    }


def main(
    address: Annotated[str, typer.Argument(help="host:port")],
    body: Annotated[str, typer.Argument(help="JSON")],
    requests: int = 1000,
    connections: int = 16,
    rate: Annotated[float, typer.Option(help="Requests a second; 0: as fast as answers come.")] = 0.0,
) -> None:
    """Send completions and print how long they took."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(json.dumps(runner.run(_run(address, body, requests, connections, rate))))


if __name__ == "__main__":
    typer.run(main)
