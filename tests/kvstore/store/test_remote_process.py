"""Two nodes on two addresses and a real Redis: blocks travel over UCX TCP, and whatever fails in between is a miss."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
import pytest

from kvstore.keys import BlockKey
from kvstore.store import store_pb2 as pb
from kvstore.store.client import StoreClient
from kvstore.store.config import operator_socket
from kvstore.store.store_pb2_grpc import StoreOperatorStub
from kvstore.store.tier import Tier
from tests.kvstore.store.blocks import BLOCK_BYTES, attach, chain, read, save
from tests.kvstore.store.node_process import NodeProcess, start_node
from tests.kvstore.store.redis_process import RedisProcess, start_redis

DEADLINE_S = 20.0


@dataclass(frozen=True, slots=True)
class Pair:
    redis: RedisProcess
    here: NodeProcess
    there: NodeProcess
    mine: StoreClient
    theirs: StoreClient


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisProcess]:
    server = start_redis(tmp_path)
    yield server
    server.process.send_signal(signal.SIGCONT)
    server.kill()


@pytest.fixture
async def pair(tmp_path: Path, redis: RedisProcess) -> AsyncIterator[Pair]:
    nodes = [
        start_node(tmp_path, "--redis", redis.url, "--host", host, node_id=name)
        for name, host in (("here", "127.0.0.1"), ("there", "127.0.0.2"))
    ]
    clients = [await attach(node.socket) for node in nodes]
    yield Pair(redis, *nodes, *clients)
    for client in clients:
        await client.close()
    for node in nodes:
        with contextlib.suppress(ProcessLookupError):
            node.process.send_signal(signal.SIGCONT)
        node.kill()


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not await condition():
            await asyncio.sleep(0.02)


async def until_located(client: StoreClient, keys: list[BlockKey]) -> None:
    async def located() -> bool:
        return await client.lookup(keys) == [Tier.REMOTE] * len(keys)

    await until(located)


async def test_a_node_serves_what_only_the_other_has_seen(pair: Pair) -> None:
    keys = chain(1, 40)
    await save(pair.theirs, keys)
    await until_located(pair.mine, keys)
    assert read(await pair.mine.load(keys, DEADLINE_S)) == ["remote"] * 40
    assert read(await pair.mine.load(keys, DEADLINE_S)) == ["host"] * 40
    log = (Path(pair.here.socket).parent / "here.log").read_text()
    assert "linked to store node there: tcp" in log


async def test_a_chain_of_two_nodes_parts_is_joined(pair: Pair) -> None:
    keys = chain(1, 12)
    await save(pair.mine, keys[:5])
    await save(pair.theirs, keys)
    await until_located(pair.mine, chain(1, 12)[5:])
    assert read(await pair.mine.load(keys, DEADLINE_S)) == ["host"] * 5 + ["remote"] * 7


async def test_a_foreign_salt_finds_nothing_remotely(pair: Pair) -> None:
    await save(pair.theirs, chain(1, 5, b"a"))
    await until_located(pair.mine, chain(1, 5, b"a"))
    assert await pair.mine.lookup(chain(1, 5, b"b")) == []
    assert read(await pair.mine.load(chain(1, 5, b"b"), 1.0)) == []


async def test_what_is_fetched_counts_for_its_tenant(pair: Pair) -> None:
    await save(pair.theirs, chain(1, 5), "somebody")
    await until_located(pair.mine, chain(1, 5))
    assert read(await pair.mine.load(chain(1, 5), DEADLINE_S)) == ["remote"] * 5
    async with grpc.aio.insecure_channel(f"unix:{operator_socket(Path(pair.here.socket))}") as operators:
        stat: pb.StatReply = await StoreOperatorStub(operators).Stat(pb.StatRequest())
    assert dict(stat.tenant_bytes) == {"somebody": 5 * BLOCK_BYTES}


async def test_what_the_owner_has_lost_is_a_miss(pair: Pair, tmp_path: Path) -> None:
    keys = chain(1, 5)
    await save(pair.theirs, keys)
    await until_located(pair.mine, keys)
    with await pair.theirs.load(keys, 1.0) as lease:
        for block in lease.blocks:
            block.data[0] ^= 1
    await pair.theirs.report_corrupt(keys)  # the index does not know
    assert await pair.mine.lookup(keys) == [Tier.REMOTE] * 5
    assert read(await pair.mine.load(keys, DEADLINE_S)) == []


async def test_bytes_that_are_not_what_was_offered_are_a_miss(pair: Pair) -> None:
    keys = chain(1, 5)
    await save(pair.theirs, keys)
    await until_located(pair.mine, keys)
    with await pair.theirs.load(keys, 1.0) as lease:
        lease.blocks[3].data[9] ^= 1  # flipped in the owner's memory, and nobody there noticed
    assert read(await pair.mine.load(keys, 5.0)) == []
    async with grpc.aio.insecure_channel(f"unix:{operator_socket(Path(pair.here.socket))}") as operators:
        stat: pb.StatReply = await StoreOperatorStub(operators).Stat(pb.StatRequest())
    assert {tier.tier: tier.corrupt for tier in stat.tiers} == {"host": 0, "disk": 0, "remote": 1}
    assert await save(pair.mine, keys) == 5, "every slot of the failed fetch is free again"


async def test_a_dead_owner_is_a_miss(pair: Pair) -> None:
    keys = chain(1, 5)
    await save(pair.theirs, keys)
    await until_located(pair.mine, keys)
    pair.there.kill()
    assert read(await pair.mine.load(keys, DEADLINE_S)) == []
    assert await save(pair.mine, keys) == 5


async def test_a_dead_owner_is_not_dialled_for_ever(pair: Pair) -> None:
    """Nothing was under way when it died, so no operation fails; the next fetch finds nobody."""
    keys, others = chain(1, 10), chain(2, 10)
    await save(pair.theirs, keys)
    await save(pair.theirs, others)
    await until_located(pair.mine, keys)
    await until_located(pair.mine, others)
    assert read(await pair.mine.load(keys, DEADLINE_S)) == ["remote"] * 10
    pair.there.kill()
    assert read(await pair.mine.load(others, 2.0)) == []
    dialled = asyncio.Event()

    def dials(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()
        dialled.set()

    host, _, port = pair.there.address.rpartition(":")
    async with await asyncio.start_server(dials, host, int(port)):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(dialled.wait(), 3.0)  # a channel that is kept dials once a second
    log = (Path(pair.here.socket).parent / "here.log").read_text()
    assert "closing the link with store node there: it does not answer" in log


async def test_an_owner_that_freezes_after_it_was_linked_costs_the_deadline(pair: Pair) -> None:
    await save(pair.theirs, [*chain(1, 3), *chain(2, 3)])
    await until_located(pair.mine, chain(2, 3))
    assert read(await pair.mine.load(chain(1, 3), DEADLINE_S)) == ["remote"] * 3
    pair.there.process.send_signal(signal.SIGSTOP)
    assert read(await pair.mine.load(chain(2, 3), 0.5)) == []
    assert await pair.mine.lookup(chain(1, 3)) == [Tier.HOST] * 3


@pytest.mark.parametrize("harm", ["kill", "freeze", "empty"])
async def test_losing_the_index_loses_nothing_local(pair: Pair, harm: str) -> None:
    await save(pair.theirs, chain(1, 4))
    await save(pair.mine, chain(2, 4))
    await until_located(pair.mine, chain(1, 4))
    match harm:
        case "kill":
            pair.redis.kill()
        case "freeze":
            pair.redis.process.send_signal(signal.SIGSTOP)
        case _:
            assert pair.redis.call(b"FLUSHALL").startswith(b"+OK")
    assert read(await pair.mine.load(chain(2, 4), DEADLINE_S)) == ["host"] * 4
    assert read(await pair.mine.load(chain(3, 4), 1.0)) == []
    assert await save(pair.mine, chain(3, 4)) == 4
    assert pair.mine.attached
    assert pair.theirs.attached


async def test_an_index_that_froze_is_used_again_when_it_is_back(pair: Pair) -> None:
    pair.redis.process.send_signal(signal.SIGSTOP)
    await save(pair.theirs, chain(1, 4))
    for _ in range(4):
        assert await pair.mine.lookup(chain(1, 4)) == []
    pair.redis.process.send_signal(signal.SIGCONT)
    await until_located(pair.mine, chain(1, 4))
    assert read(await pair.mine.load(chain(1, 4), DEADLINE_S)) == ["remote"] * 4
