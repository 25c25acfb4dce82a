"""The index in Redis as people run it: password, user, TLS, cluster, sentinel; and whatever part of it is lost."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from kvstore.errors import Unavailable
from kvstore.keys import BlockKey
from kvstore.store.client import StoreClient
from kvstore.store.locations import connect
from kvstore.store.tier import Tier
from tests.kvstore.store import redis_kinds
from tests.kvstore.store.blocks import attach, chain, read, save
from tests.kvstore.store.node_process import start_node
from tests.kvstore.store.redis_kinds import Deployment

DEADLINE_S = 40.0
NO_TLS = redis_kinds.TLS_SERVER is None and os.environ.get("CI") != "true"
Kind = Callable[[Path], AbstractContextManager[Deployment]]


@contextlib.asynccontextmanager
async def two_nodes(folder: Path, url: str) -> AsyncIterator[tuple[StoreClient, StoreClient]]:
    nodes, clients = [], []
    try:
        for name, host in (("here", "127.0.0.1"), ("there", "127.0.0.2")):
            nodes.append(start_node(folder, "--redis", url, "--host", host, node_id=name))
            clients.append(await attach(nodes[-1].socket))
        yield clients[0], clients[1]
    finally:
        for client in clients:
            await client.close()
        for node in nodes:
            node.kill()


async def until_located(client: StoreClient, keys: list[BlockKey]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while await client.lookup(keys) != [Tier.REMOTE] * len(keys):
            await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(redis_kinds.with_password, id="password"),
        pytest.param(redis_kinds.with_user, id="user"),
        pytest.param(
            redis_kinds.with_tls,
            id="tls",
            marks=pytest.mark.skipif(NO_TLS, reason="no Redis server with TLS: apt-get install redis-server"),
        ),
        pytest.param(redis_kinds.cluster, id="cluster"),
        pytest.param(redis_kinds.sentinel, id="sentinel"),
    ],
)
async def test_nodes_find_each_others_blocks(tmp_path: Path, kind: Kind) -> None:
    with kind(tmp_path / "redis") as redis:
        async with two_nodes(tmp_path, redis.url) as (mine, theirs):
            keys = chain(1, 40)  # of more slots than a cluster has nodes
            assert await save(theirs, keys) == 40
            await until_located(mine, keys)
            assert read(await mine.load(keys, 10.0)) == ["remote"] * 40


async def test_a_replica_that_takes_over_is_asked_next(tmp_path: Path) -> None:
    with redis_kinds.sentinel(tmp_path / "redis") as redis:
        async with two_nodes(tmp_path, redis.url) as (mine, theirs):
            assert await save(theirs, chain(1, 4)) == 4
            await until_located(mine, chain(1, 4))
            redis.servers[0].kill()
            assert await save(theirs, chain(2, 4)) == 4
            await until_located(mine, chain(2, 4))
            assert read(await mine.load(chain(2, 4), 10.0)) == ["remote"] * 4


async def test_a_cluster_that_lost_a_part_costs_nothing_local(tmp_path: Path) -> None:
    with redis_kinds.cluster(tmp_path / "redis") as redis:
        async with two_nodes(tmp_path, redis.url) as (mine, theirs):
            await save(theirs, chain(1, 4))
            await until_located(mine, chain(1, 4))
            for server in redis.servers[1:]:
                server.kill()
            assert await save(mine, chain(2, 40)) == 40
            assert read(await mine.load(chain(2, 40), 5.0)) == ["host"] * 40
            assert read(await mine.load(chain(3, 4), 5.0)) == []
            assert mine.attached
            assert theirs.attached


async def test_a_wrong_password_costs_the_remote_tier_only(tmp_path: Path) -> None:
    with redis_kinds.with_password(tmp_path / "redis") as redis:
        async with two_nodes(tmp_path, redis.url.replace("secret", "guess")) as (mine, theirs):
            assert await save(theirs, chain(1, 4)) == 4
            assert read(await theirs.load(chain(1, 4), 5.0)) == ["host"] * 4
            assert read(await mine.load(chain(1, 4), 1.0)) == []


@pytest.mark.parametrize("url", ["http://127.0.0.1", "redis+sentinel://127.0.0.1/kv", "redis+cluster://127.0.0.1:x"])
def test_what_is_no_url_of_redis_is_told(url: str) -> None:
    with pytest.raises(Unavailable, match="not a Redis URL"):
        connect(url)
