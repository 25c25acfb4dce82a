"""A router that replays a session's KV events knows exactly which blocks the worker holds."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kvstore.keys import KEY_BYTES
from kvstore.transfer.loopback import LoopbackNetwork
from pdserve.protocol import worker_pb2 as pb
from pdserve.worker.config import Role
from tests.support.router_client import Ask, RouterClient
from tests.support.worker_pair import eventually, prompt_of, running_node, worker_pair


def split(keys: bytes) -> set[bytes]:
    assert len(keys) % KEY_BYTES == 0
    return {keys[start : start + KEY_BYTES] for start in range(0, len(keys), KEY_BYTES)}


def replay(messages: Sequence[pb.WorkerMessage]) -> set[bytes]:
    events = [message.kv_events for message in messages if message.WhichOneof("body") == "kv_events"]
    assert [event.sequence for event in events] == list(range(len(events)))
    assert [event.snapshot for event in events] == [True] + [False] * (len(events) - 1)
    visible: set[bytes] = set()
    for event in events:
        visible -= split(event.removed)
        visible |= split(event.stored)
    return visible


async def snapshot(router: RouterClient) -> None:
    await router.wait(lambda message: True if message.kv_events.snapshot else None)


async def test_replay_gives_the_pool() -> None:
    """With evictions: the pools are small."""
    async with worker_pair(num_blocks=20) as pair:
        joined = []
        for number in range(12):
            ask = Ask(f"r{number}", prompt_of(4 + 5 * (number % 7), salt=number % 5))
            assert await pair.run(ask) == ask.expected
            if number % 4 == 1:
                joined.append(RouterClient(pair.decode.hello.address))
                await joined[-1].open()
        await pair.whole()
        assert any(message.kv_events.removed for message in pair.decode.router.messages)
        for node in pair.nodes:
            await node.heard()
            assert replay(node.router.messages) == set(node.engine.pool.visible_keys())
        for router in joined:
            router.send(ping=pb.Ping(sequence=1))
            await router.wait(lambda message: message.pong.sequence == 1 or None)
            assert replay(router.messages) == set(pair.decode.engine.pool.visible_keys())
            await router.close()


async def test_no_event_is_lost_between_snapshot_and_subscription() -> None:
    """The loop is held up while the engine takes the snapshot and, a step later, makes more blocks visible."""
    async with running_node(LoopbackNetwork(), "w", Role.MIXED) as node:
        node.gate.close()
        ask = Ask("r", prompt_of(48))
        node.submit(ask, disaggregated=False)
        await node.gate.reached()
        router = RouterClient(node.hello.address)
        await router.open()  # the question for the snapshot waits behind the step
        for _ in range(2):
            node.gate.pass_step()
            node.gate.wait()
        await snapshot(router)
        node.gate.open()
        await node.router.finished(ask)
        router.send(ping=pb.Ping(sequence=1))
        await router.wait(lambda message: message.pong.sequence == 1 or None)
        await node.heard()
        assert replay(router.messages) == set(node.engine.pool.visible_keys())
        await router.close()


async def test_blocks_are_told_only_when_they_are_verified() -> None:
    async with worker_pair() as pair:
        ask = Ask("r", prompt_of(20))
        pair.prefill.submit(ask)
        await pair.prefill.router.wanted(ask)
        pair.decode.reserve(ask, pair.prefill)
        ticket = await pair.decode.router.reserved(ask)
        await pair.decode.heard()
        assert replay(pair.decode.router.messages) == set()
        pair.prefill.hand_off(ask, ticket)
        await pair.decode.router.finished(ask)

        async def told() -> bool:
            return len(replay(pair.decode.router.messages)) == (20 + 5) // 4

        await eventually(told, "blocks are not told")


async def test_router_that_leaves_early_harms_nobody() -> None:
    async with running_node(LoopbackNetwork(), "w", Role.MIXED) as node:
        node.gate.close()
        ask = Ask("r", prompt_of(20))
        node.submit(ask, disaggregated=False)
        await node.gate.reached()
        for _ in range(3):
            router = RouterClient(node.hello.address)
            await router.open()
            await router.close()
        await asyncio.sleep(0)
        node.gate.open()
        await node.router.finished(ask)
        await node.heard()
        assert [event.token_id for event in node.router.events(ask)] == ask.expected
