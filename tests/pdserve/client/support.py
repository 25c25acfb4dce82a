"""Handlers of the tests, and how they ask."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from pdserve.client import Client, Handler, HandlerFailed, Server, serve


def tells(name: str) -> Handler:
    async def handler(request: bytes) -> AsyncIterator[bytes]:
        yield name.encode()
        yield request

    return handler


@dataclass
class Held:
    """Its call gives one part, then waits until it is let go."""

    let_go: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def handler(self, request: bytes) -> AsyncIterator[bytes]:
        try:
            yield b"first"
            await self.let_go.wait()
            yield b"last"
        finally:
            self.ended.set()


@dataclass
class Fails:
    with_: Exception
    after: int = 1

    async def handler(self, request: bytes) -> AsyncIterator[bytes]:
        for _ in range(self.after):
            yield b"part"
        raise self.with_


def too_long(after: int) -> Fails:
    return Fails(HandlerFailed("too_long", "the text is too long"), after)


async def named(redis_url: str, component: str, name: str, **options: int) -> Server:
    return await serve(component, {"tell": tells(name)}, redis_url=redis_url, instance_id=name, **options)  # type: ignore[arg-type]


async def who(client: Client) -> str:
    parts = [part async for part in client.round_robin(b"x", timeout_s=30)]
    assert parts[1:] == [b"x"]
    return parts[0].decode()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.sleep(0.02)
