"""Workers with a real store node between them: what one computed another loads, and no answer ever changes."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore.keys import block_keys, root_key
from kvstore.store.client import StoreClient
from kvstore.store.config import StoreConfig
from kvstore.store.node import running_node as running_store
from kvstore.transfer.loopback import LoopbackNetwork
from pdserve.protocol import worker_pb2 as pb
from pdserve.worker.config import Role
from tests.support.router_client import Ask
from tests.support.tiny_engine import BLOCK_SIZE, GEOMETRY, ROOT
from tests.support.worker_pair import Faults, Node, Pair, check_stream, eventually, prompt_of, running_node

HOST_BYTES = 1 << 20


@dataclass
class Site:
    """A store node, and workers that join it one after the other."""

    socket: Path
    stack: contextlib.AsyncExitStack
    network: LoopbackNetwork = field(default_factory=LoopbackNetwork)

    async def worker(self, worker_id: str, **options: Any) -> Node:
        node = running_node(self.network, worker_id, Role.MIXED, store=self.socket, **options)
        return await self.stack.enter_async_context(node)

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[StoreClient]:
        fingerprint = GEOMETRY.fingerprint("oracle")
        client = await StoreClient.attach(
            self.socket, fingerprint=fingerprint, block_bytes=GEOMETRY.block_bytes, owner="test"
        )
        try:
            yield client
        finally:
            await client.close()

    async def saved(self, tokens: list[int], root: bytes = ROOT) -> None:
        """Every full block of these tokens is in the store."""
        keys = block_keys(root, tokens, BLOCK_SIZE)  # type: ignore[arg-type]
        async with self.client() as client:

            async def there() -> bool:
                return len(await client.lookup(keys)) == len(keys)

            await eventually(there, "blocks are not saved")


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    socket = tmp_path / "store.sock"
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(running_store(StoreConfig("n", socket, HOST_BYTES)))
        yield Site(socket, stack)


async def run(node: Node, ask: Ask) -> list[int]:
    node.submit(ask, disaggregated=False)
    await node.router.finished(ask)
    return [*ask.output, *check_stream(node.router.events(ask), len(ask.output))]


async def cached(node: Node, ask: Ask) -> dict[str, int]:
    return dict((await node.router.event(ask)).cached_by_tier)


async def whole(node: Node) -> None:
    async def idle() -> bool:
        ledger = await node.ledger()
        return bool(ledger["idle"]) and not ledger["holds"]

    await eventually(idle, "the pool is not whole")


async def test_prompt_computed_on_one_worker_is_loaded_by_another(site: Site) -> None:
    first, ask = await site.worker("a"), Ask("first", prompt_of(18))
    assert await run(first, ask) == ask.expected
    assert await cached(first, ask) == {}
    await site.saved([*ask.prompt])
    second, again = await site.worker("b"), Ask("again", prompt_of(18))
    assert await run(second, again) == ask.expected
    assert await cached(second, again) == {"host": 16}
    assert (await second.router.event(again)).times.fetch_s > 0
    await whole(second)


async def test_next_turn_recomputes_nothing_of_the_answer_on_whichever_worker(site: Site) -> None:
    first, turn = await site.worker("a"), Ask("turn", prompt_of(10), max_tokens=15)
    answer = await run(first, turn)
    known = [*turn.prompt, *answer[:-1]]  # the last token's KV was never computed
    await site.saved(known)
    second, more = await site.worker("b"), Ask("more", (*turn.prompt, *answer, *prompt_of(5, salt=3)))
    assert await run(second, more) == more.expected
    assert await cached(second, more) == {"host": len(known) // BLOCK_SIZE * BLOCK_SIZE}


async def test_only_what_the_pool_lacks_is_loaded(site: Site) -> None:
    first, second = await site.worker("a"), await site.worker("b")
    short, long = Ask("short", prompt_of(9)), Ask("long", prompt_of(40))
    assert await run(second, short) == short.expected
    assert await run(first, long) == long.expected
    await site.saved([*long.prompt])
    again = Ask("again", prompt_of(40))
    assert await run(second, again) == long.expected
    assert await cached(second, again) == {"device": 8, "host": 28}


async def test_blocks_are_loaded_before_anyone_asks_and_routers_hear_of_it(site: Site) -> None:
    """What a router sees as hot: the second worker then has it on its device, and says so without a step."""
    first, ask = await site.worker("a"), Ask("first", prompt_of(18))
    assert await run(first, ask) == ask.expected
    await site.saved([*ask.prompt])
    second = await site.worker("b")
    node = await second.router.wait(lambda message: message.store if message.HasField("store") else None)
    assert node.address
    assert node.incarnation
    assert not node.shares
    keys = block_keys(ROOT, ask.prompt, BLOCK_SIZE)
    second.router.send(prefetch=pb.Prefetch(keys=b"".join(keys)))
    await second.router.wait(lambda message: message.kv_events.stored == b"".join(keys) or None)
    again = Ask("again", prompt_of(18))
    assert await run(second, again) == ask.expected
    assert await cached(second, again) == {"device": 16}
    second.router.send(prefetch=pb.Prefetch(keys=b"".join(keys)))  # it has them
    await second.heard()
    await whole(second)


async def test_resumed_request_goes_on_from_the_store(site: Site) -> None:
    """As after the death of a decode worker: the tail is computed, the rest is loaded, and the tokens are the same."""
    first, ask = await site.worker("a"), Ask("r", prompt_of(21), max_tokens=12, temperature=1.0)
    first.submit(ask, disaggregated=False)
    output = [(await first.router.event(ask, n)).token_id for n in range(7)]
    first.abort(ask)
    await site.saved([*ask.prompt, *output[:-1]])
    second = await site.worker("b")
    resumed = Ask("r", ask.prompt, max_tokens=12, temperature=1.0, attempt=1, output=tuple(output))
    assert await run(second, resumed) == ask.expected
    assert await cached(second, resumed) == {"host": 21}  # all of the prompt; blocks of the answer come on top


async def test_corrupt_block_is_found_counted_and_computed(site: Site) -> None:
    first, ask = await site.worker("a"), Ask("first", prompt_of(18))
    await run(first, ask)
    await site.saved([*ask.prompt])
    keys = block_keys(ROOT, [*ask.prompt], BLOCK_SIZE)
    async with site.client() as client:
        with await client.load(keys, 1.0) as lease:
            damaged = lease.blocks[2].data
            damaged.flags.writeable = True
            damaged[5] ^= 4
    second, again = await site.worker("b"), Ask("again", prompt_of(18))
    assert await run(second, again) == ask.expected
    assert await cached(second, again) == {"host": 8}
    assert await second.metric("pdserve_store_corrupt_blocks_total") == 1
    async with site.client() as client:

        async def dropped_and_saved_anew() -> bool:
            with await client.load(keys, 1.0) as lease:
                copies = [(np.array(block.data), block.checksum) for block in lease.blocks]
            return len(copies) == len(keys)

        await eventually(dropped_and_saved_anew, "the block did not come back")


async def test_other_tenant_finds_nothing_and_the_same_one_does(site: Site) -> None:
    mine, theirs = (root_key(GEOMETRY.fingerprint("oracle"), salt=salt) for salt in (b"mine", b"theirs"))
    first, ask = await site.worker("a"), Ask("first", prompt_of(18), root_key=mine)
    assert await run(first, ask) == ask.expected
    await site.saved([*ask.prompt], mine)
    second = await site.worker("b")
    for root, expected in ((theirs, {}), (mine, {"host": 16})):
        again = Ask(f"again {root.hex()}", prompt_of(18), root_key=root)
        assert await run(second, again) == ask.expected
        assert await cached(second, again) == expected


async def test_worker_serves_on_when_its_store_dies_and_without_one(tmp_path: Path) -> None:
    socket = tmp_path / "store.sock"
    network = LoopbackNetwork()
    async with running_node(network, "a", Role.MIXED, store=socket) as node:  # nobody listens yet
        before = Ask("before", prompt_of(18))
        assert await run(node, before) == before.expected
        async with running_store(StoreConfig("n", socket, HOST_BYTES)):
            during = Ask("during", prompt_of(18, salt=1))
            assert await run(node, during) == during.expected
        after = Ask("after", prompt_of(18, salt=2))
        assert await run(node, after) == after.expected
        await whole(node)


async def test_store_of_another_model_is_refused_and_the_worker_serves(site: Site) -> None:
    await site.worker("a")
    other, ask = await site.worker("b", weights="others"), Ask("r", prompt_of(18))
    assert not other.hello.has_store
    assert await run(other, ask) == ask.expected


async def test_load_takes_no_room_from_those_who_run(site: Site) -> None:
    """A pool that is nearly full loads nothing: the prompt waits its turn and is computed."""
    first, long = await site.worker("a"), Ask("long", prompt_of(40))
    await run(first, long)
    await site.saved([*long.prompt])
    second = await site.worker("b", num_blocks=14)
    second.gate.close()
    running = Ask("running", prompt_of(20, salt=1), max_tokens=8)
    second.submit(running, disaggregated=False)
    await second.gate.reached()
    again = Ask("again", prompt_of(40))
    second.submit(again, disaggregated=False)
    second.gate.open()
    for ask in (running, again):
        await second.router.finished(ask)
        assert check_stream(second.router.events(ask), 0) == ask.expected
    await whole(second)


async def test_aborted_while_it_loads_leaves_the_pool_whole(site: Site) -> None:
    first, ask = await site.worker("a"), Ask("first", prompt_of(40))
    await run(first, ask)
    await site.saved([*ask.prompt])
    second, again = await site.worker("b"), Ask("again", prompt_of(40))
    second.gate.close()
    other = Ask("other", prompt_of(5, salt=9))
    second.submit(other, disaggregated=False)  # the engine is in a step: the load has to wait for its blocks
    await second.gate.reached()
    second.submit(again, disaggregated=False)
    second.abort(again)
    await second.heard()
    second.gate.open()
    await second.router.finished(other)
    await whole(second)
    assert second.router.events(again) == []


async def test_both_roles_save_and_handed_over_streams_stay_exact(site: Site) -> None:
    nodes = [
        await site.stack.enter_async_context(running_node(site.network, name, role, store=site.socket))
        for name, role in (("p", Role.PREFILL), ("d", Role.DECODE))
    ]
    pair = Pair(nodes, Faults(), site.network)
    pair.prefill.list_peers(pair.decode)
    await pair.prefill.router.link("d", up=True)
    ask = Ask("r", prompt_of(13), max_tokens=12)
    output = await pair.run(ask)
    assert output == ask.expected
    await site.saved([*ask.prompt, *output[:-1]])
    await pair.whole()


async def test_what_was_saved_is_counted(site: Site) -> None:
    node = await site.worker("a")
    ask = Ask("r", prompt_of(18))
    assert await run(node, ask) == ask.expected
    await site.saved([*ask.prompt])
    assert await node.metric("pdserve_store_save_dropped_blocks_total") == 0
    assert await node.metric("pdserve_store_save_backlog_blocks") == 0
    assert await node.metric("pdserve_store_saved_bytes_total") == 5 * GEOMETRY.block_bytes


async def test_saving_lets_no_block_outlive_its_parent_in_the_pool(site: Site) -> None:
    """Batches are small here, so the chain is saved part by part after its sequence has ended."""
    node = await site.worker("a", num_blocks=20)
    first = Ask("first", prompt_of(45))
    output = await run(node, first)
    known = [*first.prompt, *output[:-1]]
    await site.saved(known)
    await whole(node)
    other = Ask("other", prompt_of(45, salt=1))
    assert await run(node, other) == other.expected
    await whole(node)
    keys = block_keys(ROOT, known, BLOCK_SIZE)
    visible = set(node.engine.pool.visible_keys())
    hit = node.engine.pool.match(keys)
    assert 0 < hit < len(keys), "some of the first prompt was evicted"
    assert not visible & set(keys[hit:])
