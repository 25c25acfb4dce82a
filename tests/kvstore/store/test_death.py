"""kill -9 amid a fetch, a promotion and a load: no slot is lost, no wrong byte is given, the index stays a hint."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc.aio
import pytest

from kvstore.keys import BlockKey
from kvstore.store import store_pb2 as pb
from kvstore.store.client import StoreClient
from kvstore.store.config import operator_socket
from kvstore.store.store_pb2_grpc import StoreOperatorStub
from kvstore.store.tier import Tier
from tests.kvstore.store.blocks import attach, chain, read, save
from tests.kvstore.store.ledgers import DEADLINE_S, ledger, until
from tests.kvstore.store.node_process import ROOT, NodeProcess, start_node
from tests.kvstore.store.redis_process import RedisProcess, start_redis

MANY = 1000  # blocks: enough to be met in the middle
BIG = ("--host-bytes", "16MiB")


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisProcess]:
    server = start_redis(tmp_path)
    yield server
    server.kill()


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[NodeProcess]:
    """With `MANY` blocks on its disk and none in its host tier."""
    running = start_node(
        tmp_path, *BIG, "--disk-bytes", "64MiB", "--disk-path", str(tmp_path / "disk"), "--policy", "all"
    )
    yield running
    running.kill()


@pytest.fixture
async def client(node: NodeProcess) -> AsyncIterator[StoreClient]:
    attached = await attach(node.socket)
    yield attached
    await attached.close()


async def only_on_disk(node: NodeProcess, client: StoreClient, keys: list[BlockKey]) -> None:
    """Save these, and have them in the disk tier alone."""
    assert await save(client, keys) == len(keys)
    async with (
        asyncio.timeout(DEADLINE_S),
        grpc.aio.insecure_channel(f"unix:{operator_socket(Path(node.socket))}") as to,
    ):
        while await client.lookup(keys) != [Tier.DISK] * len(keys):
            await StoreOperatorStub(to).Evict(pb.EvictRequest(all=True, tier=Tier.HOST))  # not those yet to be written


async def idle(node: NodeProcess) -> None:
    """Only free and cached slots (design invariant I1)."""
    async with asyncio.timeout(DEADLINE_S):
        while not (await ledger(node))["idle"]:
            await asyncio.sleep(0.02)


async def until_some(node: NodeProcess, state: str) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not (await ledger(node))["by_state"][state]:
            await asyncio.sleep(0)


async def start_loading(node: NodeProcess, seed: int) -> asyncio.subprocess.Process:
    """A worker process that has asked for chain(seed, MANY), and goes on running whatever it is given."""
    script = f"""
import asyncio
from tests.kvstore.store.blocks import attach, chain
async def main():
    client = await attach({node.socket!r}, "doomed")
    loading = asyncio.create_task(client.load(chain({seed}, {MANY}), 10.0))
    await asyncio.sleep(0)
    print("asked", flush=True)
    lease = await loading
    await asyncio.Event().wait()
asyncio.run(main())
"""
    worker = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", script),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert worker.stdout is not None
    assert await asyncio.wait_for(worker.stdout.readline(), DEADLINE_S) == b"asked\n"
    return worker


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2"], ids=["shared memory", "tcp"])
async def test_a_peer_killed_in_the_middle_of_a_fetch(tmp_path: Path, redis: RedisProcess, host: str) -> None:
    shared = (*BIG, "--redis", redis.url)
    here, there = start_node(tmp_path, *shared, node_id="here"), start_node(
        tmp_path, *shared, "--host", host, node_id="there"
    )  # fmt: skip
    mine, theirs = await attach(here.socket), await attach(there.socket)
    try:
        keys = chain(1, MANY)
        await save(mine, chain(2, 4))
        await save(theirs, keys)
        async with asyncio.timeout(DEADLINE_S):
            while await mine.lookup(keys) != [Tier.REMOTE] * MANY:
                await asyncio.sleep(0.02)
        loading = asyncio.create_task(mine.load(keys, 5.0))
        await until_some(here, "receiving")
        there.kill()
        read(await loading)  # whatever has come is right (I5)
        await idle(here)  # every slot of the fetch is free, or has a verified block (I1)
        assert (await ledger(here))["by_state"]["quarantined"] == 0
        # The index still names the dead node (I8): that costs a miss, and nothing of what is here.
        assert set(read(await mine.load(keys, 1.0))) <= {"host"}
        assert read(await mine.load(chain(2, 4), 1.0)) == ["host"] * 4
        await save(mine, keys)
        assert read(await mine.load(keys, 5.0)) == ["host"] * MANY
        await idle(here)
    finally:
        for client in (mine, theirs):
            await client.close()
        for node in (here, there):
            with contextlib.suppress(ProcessLookupError):
                node.kill()


async def test_the_memory_of_a_dead_node_is_let_go(node: NodeProcess, client: StoreClient) -> None:
    """Else its next life finds no room for its own beside it, and stays without a host tier."""
    keys = chain(1, 4)
    await save(client, keys)
    assert read(await client.load(keys, DEADLINE_S)) == ["host"] * 4
    arena = next(
        line.split()[-1]
        for line in Path(f"/proc/{node.process.pid}/maps").read_text().splitlines()
        if "/dev/shm/" in line
    )
    assert arena in Path("/proc/self/maps").read_text()
    node.process.send_signal(signal.SIGSTOP)
    assert await client.lookup(chain(9, 1)) == []
    assert not client.attached
    assert arena in Path("/proc/self/maps").read_text(), "one that is late may go on"
    node.kill()
    async with asyncio.timeout(DEADLINE_S):
        while arena in Path("/proc/self/maps").read_text():
            await asyncio.sleep(0.02)


async def test_a_node_killed_again_and_again_while_it_is_saved_to(tmp_path: Path) -> None:
    """What the next life has is whole and right, what it has not is a miss, and no slot is lost."""
    options = (*BIG, "--disk-bytes", "64MiB", "--disk-path", str(tmp_path / "disk"), "--policy", "all")
    node = start_node(tmp_path, *options)
    client = await attach(node.socket)
    try:
        for life in range(3):
            saving = asyncio.create_task(_save_many(client, life))
            async with asyncio.timeout(DEADLINE_S):  # in the middle: some are there, some are being written
                while not len(await client.lookup(chain(100 * life, MANY))):
                    await asyncio.sleep(0)
            node.kill()
            await saving
            node = start_node(tmp_path, *options)
            async with asyncio.timeout(DEADLINE_S):
                while not client.attached:
                    await asyncio.sleep(0.02)
            for seed in range(100 * life, 100 * life + 4):
                assert set(read(await client.load(chain(seed, MANY), DEADLINE_S))) <= {"disk", "host"}
            await idle(node)
            assert await save(client, chain(1000 + life, 8)) == 8
    finally:
        await client.close()
        node.kill()


async def _save_many(client: StoreClient, life: int) -> None:
    for seed in range(100 * life, 100 * life + 4):
        await save(client, chain(seed, MANY))


async def test_a_worker_killed_while_its_blocks_are_promoted(node: NodeProcess, client: StoreClient) -> None:
    await only_on_disk(node, client, chain(1, MANY))
    worker = await start_loading(node, 1)
    await until_some(node, "held")  # the first ones are there, the rest is being read
    worker.kill()
    await worker.wait()
    await until(node, "held", 0)
    await idle(node)
    found = read(await client.load(chain(1, MANY), DEADLINE_S))
    assert len(found) == MANY
    assert found[0] == "host", "what was promoted for the dead is good for the living"
    await idle(node)


async def test_a_worker_killed_while_it_loads_again_and_again(node: NodeProcess, client: StoreClient) -> None:
    """Whenever it dies, the others read on and the slots add up."""
    await save(client, chain(1, MANY))
    for _ in range(3):
        worker = await start_loading(node, 1)
        worker.kill()
        assert len(read(await client.load(chain(1, MANY), DEADLINE_S))) == MANY
        await worker.wait()
    await idle(node)


async def test_the_disk_tier_alone_gives_blocks_to_their_tenant_only(node: NodeProcess, client: StoreClient) -> None:
    mine, foreign = chain(1, 40, b"a"), chain(1, 40, b"b")  # the same tokens, another salt
    await only_on_disk(node, client, mine)
    assert await client.lookup(foreign) == []
    assert read(await client.load(foreign, 1.0)) == []
    assert await client.lookup(mine) == [Tier.DISK] * 40
    assert read(await client.load(mine, DEADLINE_S)) == ["disk"] * 40
