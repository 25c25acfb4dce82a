"""Each tier forced alone, under a real worker: its tenant hits, another misses, and a flipped bit changes no answer."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio
import pytest

from kvstore.keys import BlockKey, block_keys, root_key
from kvstore.store import client as store_client
from kvstore.store import store_pb2 as pb
from kvstore.store.client import StoreClient
from kvstore.store.config import operator_socket
from kvstore.store.segment import HEADER_BYTES, PAGE_BYTES
from kvstore.store.store_pb2_grpc import StoreOperatorStub
from kvstore.store.tier import Tier
from kvstore.transfer.loopback import LoopbackNetwork
from pdserve.worker import fetch
from pdserve.worker.config import Role
from tests.kvstore.store.node_process import NodeProcess, start_node
from tests.kvstore.store.redis_process import start_redis
from tests.support.router_client import Ask
from tests.support.stack import metric
from tests.support.tiny_engine import BLOCK_SIZE, GEOMETRY
from tests.support.worker_pair import Node, check_stream, eventually, prompt_of, running_node

MINE, THEIRS = (root_key(GEOMETRY.fingerprint("oracle"), salt=salt) for salt in (b"mine", b"theirs"))
PROMPT_TOKENS, REUSABLE = 18, 16


@dataclass
class Tiers:
    """Stores of one or two machines. `forced` is where the second worker finds what the first one computed."""

    forced: Tier
    folder: Path
    owner: NodeProcess
    reader: NodeProcess
    stack: contextlib.AsyncExitStack
    network: LoopbackNetwork = field(default_factory=LoopbackNetwork)

    async def worker(self, worker_id: str, store: NodeProcess) -> Node:
        node = running_node(self.network, worker_id, Role.MIXED, store=Path(store.socket))
        return await self.stack.enter_async_context(node)

    @contextlib.asynccontextmanager
    async def client(self, store: NodeProcess) -> AsyncIterator[StoreClient]:
        client = await StoreClient.attach(
            store.socket, fingerprint=GEOMETRY.fingerprint("oracle"), block_bytes=GEOMETRY.block_bytes, owner="test"
        )
        try:
            yield client
        finally:
            await client.close()

    async def until_alone(self, keys: list[BlockKey]) -> None:
        """These are in the forced tier, and in no other that the second worker can reach."""
        async with (
            self.client(self.reader) as client,
            grpc.aio.insecure_channel(f"unix:{operator_socket(Path(self.reader.socket))}") as operators,
        ):

            async def alone() -> bool:
                if self.forced is Tier.DISK:  # those not yet written stay
                    await StoreOperatorStub(operators).Evict(pb.EvictRequest(all=True, tier=Tier.HOST))
                return await client.lookup(keys) == [self.forced] * len(keys)

            await eventually(alone, f"the blocks are not in the {self.forced.label} tier alone")

    async def flip(self, keys: list[BlockKey]) -> None:
        """A bit of one of these blocks, where it is now."""
        if self.forced is Tier.DISK:
            (path,) = (self.folder / "disk").glob("segment-*.kv")
            data = bytearray(path.read_bytes())
            data[PAGE_BYTES + HEADER_BYTES + 5] ^= 1
            path.write_bytes(data)
            return
        async with self.client(self.owner) as client:
            with await client.load(keys, 1.0) as lease:
                lease.blocks[0].data[5] ^= 1

    def corrupt(self) -> float:
        url = f"http://{self.reader.admin_address}/metrics"
        return metric(url, "pdserve_store_corrupt_blocks_total", tier=self.forced.label)


@pytest.fixture(params=[Tier.HOST, Tier.DISK, Tier.REMOTE], ids=lambda tier: tier.label)
async def tiers(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Tiers]:
    # To fetch is worth it however few blocks there are, and however slow the machine is.
    monkeypatch.setattr(fetch, "_PREFILL_PRIOR_TOKENS_PER_S", 1.0)
    monkeypatch.setattr(fetch, "GRACE_S", 10.0)
    monkeypatch.setattr(store_client, "CALL_TIMEOUT_S", 10.0)
    async with contextlib.AsyncExitStack() as stack:

        def node(name: str, *options: str) -> NodeProcess:
            started = start_node(tmp_path, *options, node_id=name)
            stack.callback(started.kill)
            return started

        forced: Tier = request.param
        if forced is Tier.REMOTE:
            redis = start_redis(tmp_path)
            stack.callback(redis.kill)
            owner = node("owner", "--redis", redis.url)
            reader = node("reader", "--redis", redis.url, "--host", "127.0.0.2")
        else:
            disk = ("--disk-bytes", "64MiB", "--disk-path", str(tmp_path / "disk"), "--policy", "all")
            owner = reader = node("owner", *(disk if forced is Tier.DISK else ()))
        yield Tiers(forced, tmp_path, owner, reader, stack)


async def answered(node: Node, name: str, root: BlockKey) -> dict[str, int]:
    """Ask, check the answer, and say from where its prompt came."""
    ask = Ask(name, prompt_of(PROMPT_TOKENS), root_key=root)
    node.submit(ask, disaggregated=False)
    await node.router.finished(ask)
    assert check_stream(node.router.events(ask), 0) == ask.expected
    return dict((await node.router.event(ask)).cached_by_tier)


def keys_of(root: BlockKey) -> list[BlockKey]:
    return block_keys(root, prompt_of(PROMPT_TOKENS), BLOCK_SIZE)


async def test_a_tier_alone_hits_for_its_tenant_and_misses_for_another(tiers: Tiers) -> None:
    first = await tiers.worker("a", tiers.owner)
    assert await answered(first, "first", MINE) == {}
    await tiers.until_alone(keys_of(MINE))
    second = await tiers.worker("b", tiers.reader)
    assert await answered(second, "other tenant", THEIRS) == {}
    assert await answered(second, "same tenant", MINE) == {tiers.forced.label: REUSABLE}
    assert await answered(second, "other tenant, pool", THEIRS) == {"device": REUSABLE}, "of what it computed itself"


async def test_a_pool_alone_hits_for_its_tenant_and_misses_for_another(tmp_path: Path) -> None:
    async with running_node(LoopbackNetwork(), "a", Role.MIXED) as node:
        assert await answered(node, "first", MINE) == {}
        assert await answered(node, "other tenant", THEIRS) == {}
        assert await answered(node, "same tenant", MINE) == {"device": REUSABLE}


async def test_a_bit_flipped_in_a_tier_is_counted_and_computed(tiers: Tiers) -> None:
    first = await tiers.worker("a", tiers.owner)
    assert await answered(first, "first", MINE) == {}
    await tiers.until_alone(keys_of(MINE))
    await tiers.flip(keys_of(MINE))
    second = await tiers.worker("b", tiers.reader)
    assert await answered(second, "after", MINE) == {}
    assert tiers.corrupt() >= 1  # of a fetch, each attempt
