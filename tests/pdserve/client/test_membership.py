"""Components register, are found, drain and vanish without configuration."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import pytest

from pdserve.client import Client, NoInstances, NotStarted, UnknownInstance, serve
from pdserve.discovery import Endpoint, Lease, RedisDiscovery
from pdserve.errors import ConfigError
from tests.pdserve.client.support import Held, named, tells, until, who

ROOT = Path(__file__).resolve().parents[3]
CHILD = """
import asyncio, sys
from pdserve.client import serve
async def tell(request):
    yield b"child"
    yield request
async def main():
    server = await serve("killed", {"tell": tell}, redis_url=sys.argv[1], instance_id="child", lease_ttl_s=3)
    await asyncio.Event().wait()
asyncio.run(main())
"""


def client_of(redis_url: str, component: str) -> Client:
    return Client(RedisDiscovery(redis_url, component=component), "tell", poll_s=0.05)


def ids(client: Client) -> list[str]:
    return [each.endpoint_id for each in client.instances()]


async def test_who_registers_is_found_and_who_closes_is_gone(redis_url: str) -> None:
    seen: list[list[str]] = []
    async with client_of(redis_url, "found") as client:
        client.watch(lambda instances: seen.append([each.endpoint_id for each in instances]))
        async with await named(redis_url, "found", "a"):
            await client.wait_for_instances(1, 30)
            async with await named(redis_url, "found", "b"):
                await client.wait_for_instances(2, 30)
                assert ids(client) == ["a", "b"]
            await until(lambda: ids(client) == ["a"])
            assert await who(client) == "a"
        await until(lambda: ids(client) == [])
    assert seen == [["a"], ["a", "b"], ["a"], []]


async def test_a_watcher_that_fails_stops_nothing(redis_url: str) -> None:
    def fails(instances: object) -> None:
        raise RuntimeError("of the test")

    async with client_of(redis_url, "watched") as client:
        client.watch(fails)
        async with await named(redis_url, "watched", "a"):
            await client.wait_for_instances(1, 30)
        await until(lambda: ids(client) == [])


async def test_a_killed_process_vanishes_with_its_lease_and_is_passed_by_until_then(redis_url: str) -> None:
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", CHILD, redis_url, cwd=ROOT)
    try:
        async with client_of(redis_url, "killed") as client, await named(redis_url, "killed", "ours"):
            await client.wait_for_instances(2, 60)
            assert {await who(client), await who(client)} == {"child", "ours"}
            child.send_signal(signal.SIGKILL)
            await child.wait()
            assert {await who(client), await who(client)} == {"ours"}
            await until(lambda: ids(client) == ["ours"])
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()


async def test_a_drained_one_ends_what_runs_and_takes_nothing_new(redis_url: str) -> None:
    held = Held()
    first = await serve("drained", {"tell": held.handler}, redis_url=redis_url, instance_id="a")
    async with client_of(redis_url, "drained") as client:
        await client.wait_for_instances(1, 30)
        running = client.direct(b"", "a", timeout_s=60)
        assert await anext(running) == b"first"
        async with await named(redis_url, "drained", "b"):
            await client.wait_for_instances(2, 30)
            closing = asyncio.create_task(first.close())
            await until(lambda: ids(client) == ["b"])
            assert {await who(client), await who(client)} == {"b"}
            held.let_go.set()
            assert [part async for part in running] == [b"last"]
            await closing


async def test_one_that_is_still_listed_while_it_drains_is_passed_by(redis_url: str) -> None:
    held = Held()
    client = Client(RedisDiscovery(redis_url, component="stale"), "tell", poll_s=3600)
    first = await serve("stale", {"tell": held.handler}, redis_url=redis_url, instance_id="a")
    async with await named(redis_url, "stale", "b"):
        async with client_of(redis_url, "stale") as other:
            await other.wait_for_instances(2, 30)
        async with client:
            running = client.direct(b"", "a", timeout_s=60)
            assert await anext(running) == b"first"
            closing = asyncio.create_task(first.close())
            async with client_of(redis_url, "stale") as other:
                await until(lambda: ids(other) == ["b"])
            assert ids(client) == ["a", "b"]
            assert {await who(client), await who(client)} == {"b"}
            with pytest.raises(NotStarted, match="instance a: it is draining"):
                await anext(client.direct(b"", "a"))
            held.let_go.set()
            assert [part async for part in running] == [b"last"]
            await closing


async def test_a_redis_that_does_not_answer_is_told_from_nobody_there() -> None:
    await check_nobody("redis://127.0.0.1:1", ": Redis does not answer")


async def test_nobody_there_is_a_clear_error(redis_url: str) -> None:
    await check_nobody(redis_url, "")


async def check_nobody(redis_url: str, doubt: str) -> None:
    async with client_of(redis_url, "nobody") as client:
        with pytest.raises(NoInstances, match=f"no instance of this component is listed{doubt}$"):
            client.round_robin(b"")
        with pytest.raises(UnknownInstance, match=f"no instance a is listed{doubt}$"):
            client.direct(b"", "a")
        with pytest.raises(NoInstances, match=rf"0 of 1 instances are there after 0\.1 s{doubt}$"):
            await client.wait_for_instances(1, 0.1)


async def test_another_protocol_version_is_refused_in_clear_text(redis_url: str) -> None:
    other = Endpoint("default", "versions", "new", "127.0.0.1:9", protocol_version=9)
    async with Lease(redis_url, other), client_of(redis_url, "versions") as client:
        await until(lambda: bool(client._instances.addresses))
        assert client.instances() == ()
        for call in (lambda: client.random(b""), lambda: client.direct(b"", "new")):
            with pytest.raises(NotStarted, match="instance new speaks protocol version 9, this client 1"):
                call()


async def test_an_address_that_nobody_can_dial_is_refused(redis_url: str) -> None:
    with pytest.raises(ConfigError, match="advertise_host"):
        await serve("wide", {"tell": tells("a")}, redis_url=redis_url, listen="0.0.0.0:0")
    async with await serve("wide", {}, redis_url=redis_url, listen="0.0.0.0:0", advertise_host="10.0.0.5") as server:
        assert server.instance.address.startswith("10.0.0.5:")
