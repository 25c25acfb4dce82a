"""Whoever watches a node has its picture: the snapshot, then every change, numbered without a gap."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.keys import BlockKey
from kvstore.store import store_pb2 as pb
from kvstore.store.config import operator_socket
from kvstore.store.events import MAX_SUBSCRIBERS, MAX_WAITING, EventKind, EventLog
from kvstore.store.store_pb2_grpc import StoreOperatorStub, StorePeerStub
from kvstore.store.tier import Tier
from kvstore.store.wire import split_keys
from tests.kvstore.store.blocks import attach, chain, save
from tests.kvstore.store.node_process import start_node

KEYS = [BlockKey(bytes([n]) * 16) for n in range(8)]
DEADLINE_S = 20.0
changes = st.lists(st.tuples(st.booleans(), st.sampled_from(list(Tier)[:2]), st.sampled_from(KEYS)), max_size=30)


def apply(held: dict[Tier, set[BlockKey]], kind: EventKind, tier: Tier, keys: tuple[BlockKey, ...]) -> None:
    if kind is EventKind.STORED:
        held[tier].update(keys)
    elif kind is EventKind.REMOVED:
        held[tier].difference_update(keys)
    elif kind is EventKind.CLEARED:
        held[tier].clear()


@given(changes, changes)
async def test_late_subscriber_has_the_same_picture(before: list, after: list) -> None:
    log = EventLog()
    truth: dict[Tier, set[BlockKey]] = {Tier.HOST: set(), Tier.DISK: set()}

    def emit(stored: bool, tier: Tier, key: BlockKey) -> None:
        kind = EventKind.STORED if stored else EventKind.REMOVED
        apply(truth, kind, tier, (key,))
        log.emit(kind, tier, [key])

    for change in before:
        emit(*change)
    subscription = log.subscribe({tier: sorted(keys) for tier, keys in truth.items()})
    assert subscription is not None
    for change in after:
        emit(*change)
    log.close()
    picture: dict[Tier, set[BlockKey]] = {Tier.HOST: set(), Tier.DISK: set()}
    sequence = len(before)
    live = False
    while (event := await subscription.next()) is not None:
        sequence += live
        assert event.sequence == sequence
        apply(picture, event.kind, event.tier, event.keys)
        live |= event.kind is EventKind.SNAPSHOT_END
    assert picture == truth
    assert live


async def test_subscriber_that_does_not_read_is_ended_and_subscribes_again() -> None:
    log = EventLog()
    slow = log.subscribe({})
    assert slow is not None
    for _ in range(MAX_WAITING + 1):
        log.emit(EventKind.STORED, Tier.HOST, [KEYS[0]])
    seen = 0
    while await slow.next() is not None:
        seen += 1
    assert seen == MAX_WAITING
    assert log.subscribe({}) is not None


async def test_subscribers_are_bounded() -> None:
    log = EventLog()
    assert all(log.subscribe({}) for _ in range(MAX_SUBSCRIBERS))
    assert log.subscribe({}) is None


async def test_watching_a_node(tmp_path: Path) -> None:
    node = start_node(tmp_path)
    client = await attach(node.socket)
    try:
        early, late = chain(1, 3), chain(2, 2)
        assert await save(client, early) == 3
        async with (
            grpc.aio.insecure_channel(node.address) as channel,
            grpc.aio.insecure_channel(f"unix:{operator_socket(Path(node.socket))}") as operator,
            asyncio.timeout(DEADLINE_S),
        ):
            events = StorePeerStub(channel).Watch(pb.WatchRequest())
            snapshot = await events.read()
            assert (snapshot.kind, snapshot.tier) == (pb.KvEvent.STORED, Tier.HOST)
            assert set(split_keys(snapshot.keys)) == set(early)
            end = await events.read()
            assert end.kind == pb.KvEvent.SNAPSHOT_END
            assert await save(client, late) == 2
            stored = await events.read()
            assert (stored.kind, split_keys(stored.keys)) == (pb.KvEvent.STORED, late)
            await StoreOperatorStub(operator).Evict(pb.EvictRequest(keys=early[0]))
            removed = await events.read()
            assert (removed.kind, set(split_keys(removed.keys))) == (pb.KvEvent.REMOVED, set(early))
            await StoreOperatorStub(operator).Evict(pb.EvictRequest(all=True))
            cleared = await events.read()
            assert (cleared.kind, cleared.tier, cleared.keys) == (pb.KvEvent.CLEARED, Tier.HOST, b"")
            assert [event.sequence - end.sequence for event in (stored, removed, cleared)] == [1, 2, 3]
    finally:
        await client.close()
        node.kill()


@pytest.mark.parametrize("kind", list(EventKind))
def test_kinds_are_those_of_the_wire(kind: EventKind) -> None:
    assert pb.KvEvent.Kind.Name(kind.value) == kind.name
