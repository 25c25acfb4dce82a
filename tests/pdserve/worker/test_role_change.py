"""A worker changes its role while it serves: what runs finishes or moves, what is new is turned away, links follow."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from pdserve.protocol import worker_pb2 as pb
from tests.support.router_client import Ask
from tests.support.worker_pair import Node, Pair, eventually, prompt_of, worker_pair


async def change(node: Node, role: pb.Role, drain_s: float = 60.0) -> pb.RoleReport:
    report: pb.RoleReport = await node.router.stub.ChangeRole(
        pb.ChangeRoleRequest(role=role, drain_s=drain_s), timeout=10
    )
    return report


async def became(node: Node, role: pb.Role) -> None:
    """As its session says; a hello with this role is not meant."""

    def find(message: pb.WorkerMessage) -> bool | None:
        return (message.HasField("role") and (message.role.role, message.role.next_role) == (role, 0)) or None

    await node.router.wait(find)


async def test_an_idle_worker_changes_at_once_and_tells_new_sessions() -> None:
    async with worker_pair() as pair:
        await change(pair.prefill, pb.MIXED)
        await became(pair.prefill, pb.MIXED)
        assert (await change(pair.prefill, pb.MIXED)) == pb.RoleReport(role=pb.MIXED)
        await pair.prefill.router.close()
        await pair.prefill.rejoin()
        hello = await pair.prefill.router.wait(lambda message: message.hello if message.HasField("hello") else None)
        assert (hello.role, hello.next_role) == (pb.MIXED, pb.ROLE_UNSPECIFIED)
        assert 'role="mixed"' in (await pair.prefill.get("/metrics")).text


async def test_a_sequence_finishes_in_the_old_role_and_nothing_new_is_taken() -> None:
    async with worker_pair() as pair:
        ask, late = Ask("r", prompt_of(9), max_tokens=6), Ask("late", prompt_of(5))
        pair.decode.gate.close()
        await pair.hand_over(ask)
        await pair.decode.gate.reached()
        assert (await change(pair.decode, pb.PREFILL)) == pb.RoleReport(role=pb.DECODE, next_role=pb.PREFILL)
        pair.decode.submit(late)
        assert await pair.decode.router.refused(late) == "it drains to become a prefill worker"
        pair.decode.reserve(late, pair.prefill)
        pair.decode.gate.open()
        await pair.decode.router.finished(ask)
        await became(pair.decode, pb.PREFILL)
        first = (await pair.prefill.router.event(ask)).token_id
        assert [first, *(event.token_id for event in pair.decode.router.events(ask))] == ask.expected
        await pair.whole()


async def test_what_is_left_after_the_drain_is_refused_and_its_blocks_are_free() -> None:
    async with worker_pair() as pair:
        running, computing = Ask("running", prompt_of(9), max_tokens=20), Ask("computing", prompt_of(30, salt=1))
        pair.decode.gate.close()
        await pair.hand_over(running)
        await pair.decode.gate.reached()
        await change(pair.decode, pb.MIXED, drain_s=0.0)
        assert await pair.decode.router.refused(running)
        pair.prefill.gate.close()
        pair.prefill.submit(computing)
        await pair.prefill.gate.reached()
        await change(pair.prefill, pb.MIXED, drain_s=0.0)
        assert await pair.prefill.router.refused(computing)
        for node in pair.nodes:
            node.gate.open()
            await became(node, pb.MIXED)
        await pair.whole()


async def test_a_held_hand_over_ends_by_its_ticket() -> None:
    """Prefill drains while its blocks wait for a ticket: they are pushed, and only then is it another worker."""
    async with worker_pair() as pair:
        ask = Ask("r", prompt_of(9))
        pair.prefill.submit(ask)
        await pair.prefill.router.wanted(ask)
        first = await pair.prefill.router.event(ask)
        await change(pair.prefill, pb.DECODE)
        pair.decode.reserve(ask, pair.prefill)
        pair.prefill.hand_off(ask, await pair.decode.router.reserved(ask))
        await pair.decode.router.finished(ask)
        await became(pair.prefill, pb.DECODE)
        assert [first.token_id, *(event.token_id for event in pair.decode.router.events(ask))] == ask.expected
        await pair.whole()


async def test_a_second_change_is_refused_unless_it_is_the_same() -> None:
    async with worker_pair() as pair:
        ask = Ask("r", prompt_of(9), max_tokens=6)
        pair.prefill.gate.close()
        pair.prefill.submit(ask, disaggregated=False)
        await pair.prefill.gate.reached()
        first = await change(pair.prefill, pb.DECODE)
        assert await change(pair.prefill, pb.DECODE, drain_s=0.0) == first
        for role in (pb.MIXED, pb.PREFILL):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await change(pair.prefill, role)
            assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        pair.prefill.gate.open()
        await pair.prefill.router.finished(ask)
        await became(pair.prefill, pb.DECODE)


@pytest.mark.parametrize("wrong", [{"role": 0}, {"role": 9}, {"drain_s": -1.0}, {"drain_s": float("nan")}])
async def test_malformed_changes_are_refused(wrong: dict[str, Any]) -> None:
    async with worker_pair() as pair:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await change(pair.prefill, **{"role": pb.MIXED, **wrong})
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def swap(pair: Pair) -> None:
    """Both change; a router tells them their new peers."""
    await asyncio.gather(change(pair.prefill, pb.DECODE), change(pair.decode, pb.PREFILL))
    await asyncio.gather(became(pair.prefill, pb.DECODE), became(pair.decode, pb.PREFILL))
    pair.prefill.list_peers()
    pair.decode.list_peers(pair.prefill)
    await pair.decode.router.link(pair.prefill.hello.worker_id, up=True)


async def test_a_pair_that_swaps_roles_is_linked_the_other_way_and_leaks_no_link() -> None:
    async with worker_pair() as pair:
        ask = Ask("r", prompt_of(9))
        assert await pair.run(ask) == ask.expected
        await swap(pair)
        swapped = Pair([pair.decode, pair.prefill], pair.faults, pair.network)

        async def two_ends() -> bool:
            return len(pair.network.links) == 2

        await eventually(two_ends, f"{pair.network.links}")
        again = Ask("again", prompt_of(13, salt=3))
        assert await swapped.run(again) == again.expected
        await pair.whole()
