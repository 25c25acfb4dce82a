"""A fenced ticket sends nothing more, whenever the fence comes; a forged ticket is an error and never a crash."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kvstore.transfer.loopback import Fault
from kvstore.transfer.tags import MANIFEST
from pdserve.protocol import worker_pb2 as pb
from tests.support.router_client import Ask
from tests.support.worker_pair import HELD, Pair, blocks, eventually, prompt_of, shorter, worker_pair

ASK = Ask("r", prompt_of(40))


async def fence(pair: Pair, ticket: pb.Ticket) -> list[int]:
    request = pb.FenceRequest(
        decode_worker_id=ticket.decode_worker_id,
        decode_incarnation=ticket.decode_incarnation,
        ticket_id=ticket.ticket_id,
    )
    reply = await pair.prefill.router.stub.Fence(request, timeout=10)
    return list(reply.sent_ordinals)


async def ticket_for(pair: Pair, ask: Ask = ASK) -> pb.Ticket:
    pair.prefill.submit(ask)
    await pair.prefill.router.wanted(ask)
    pair.decode.reserve(ask, pair.prefill)
    return await pair.decode.router.reserved(ask)


async def all_over(pair: Pair) -> None:
    for node in pair.nodes:
        node.abort(ASK)
    await pair.whole()
    again = replace(ASK, attempt=1)
    assert await pair.run(again) == again.expected
    await pair.whole()


async def test_hand_off_after_the_fence_is_ignored() -> None:
    async with worker_pair() as pair:
        ticket = await ticket_for(pair)
        assert await fence(pair, ticket) == []
        pair.prefill.hand_off(ASK, ticket)
        await pair.prefill.heard()
        assert pair.faults.seen == []
        await all_over(pair)


async def test_fence_stops_a_push_between_chunks() -> None:
    async with worker_pair() as pair:
        pair.prefill.gate.close()
        pair.prefill.submit(ASK)
        for _ in range(2):
            pair.prefill.gate.pass_step()
        ticket = await ticket_for(pair)
        pair.prefill.hand_off(ASK, ticket)
        await eventually(lambda: sent(pair, 8), "nothing was sent")
        for _ in range(2):
            assert await fence(pair, ticket) in (list(range(8)), [])
        assert "stopped" in await pair.prefill.router.failed(ASK)
        pair.prefill.gate.open()
        await all_over(pair)
        assert pair.faults.seen[:8] == list(range(8))
        assert pair.faults.seen[8:10] == [0, 1], "the first push went on"


async def test_fence_waits_for_what_is_under_way() -> None:
    async with worker_pair() as pair:
        with pair.faults.on(blocks, Fault(delay_s=HELD)):
            ticket = await pair.hand_over(ASK)
            await eventually(lambda: sent(pair, 11), "not all is sent")
        call = pair.prefill.router.stub.Fence(
            pb.FenceRequest(
                decode_worker_id="d", decode_incarnation=ticket.decode_incarnation, ticket_id=ticket.ticket_id
            )
        )
        await pair.prefill.heard()
        assert not call.done()
        assert (await pair.prefill.ledger())["by_state"]["sending"] == 10
        pair.prefill.transport.let_go()
        assert list((await call).sent_ordinals) == [*range(10), MANIFEST]
        await all_over(pair)


async def test_cancelled_fence_does_not_cancel_the_close_it_waits_for() -> None:
    """Decode's patience ends while prefill closes the link: the blocks are held until that is done."""
    async with worker_pair(limits=shorter(drain_s=0.05, fence_s=0.2)) as pair:
        before = len(pair.prefill.router.messages)
        with pair.faults.on(blocks, Fault(delay_s=HELD)):
            ticket = await pair.hand_over(ASK)
            await eventually(lambda: sent(pair, 11), "not all is sent")
        pair.prefill.transport.may_close.clear()
        pair.prefill.abort(ASK)
        call = pair.prefill.router.stub.Fence(
            pb.FenceRequest(
                decode_worker_id="d", decode_incarnation=ticket.decode_incarnation, ticket_id=ticket.ticket_id
            )
        )
        await pair.prefill.router.link("d", up=False, since=before)
        await pair.prefill.heard()
        call.cancel()
        await pair.prefill.router.link("d", up=True, since=before)
        assert (await pair.prefill.ledger())["by_state"]["sending"] == 10
        pair.prefill.transport.may_close.set()
        await all_over(pair)


async def test_fence_after_the_end_and_of_unknown_tickets_is_answered() -> None:
    async with worker_pair() as pair:
        ticket = await pair.hand_over(ASK)
        await pair.decode.router.finished(ASK)
        for _ in range(2):
            assert await fence(pair, ticket) == [*range(10), MANIFEST]
        for ticket_id in (0, 999, 2**64 - 1):
            assert await fence(pair, pb.Ticket(decode_worker_id="nobody", ticket_id=ticket_id)) == []
        await all_over(pair)


async def test_closed_tickets_are_remembered_up_to_a_bound() -> None:
    async with worker_pair(limits=shorter(closed_tickets=3)) as pair:
        ticket = await ticket_for(pair)
        await fence(pair, ticket)
        for ticket_id in range(100, 103):
            await fence(pair, pb.Ticket(decode_worker_id="d", ticket_id=ticket_id))
        pair.prefill.hand_off(ASK, ticket)  # forgotten: it is pushed, which is harmless
        await pair.decode.router.finished(ASK)
        await pair.whole()


FORGERIES: list[tuple[str, dict[str, Any]]] = [
    ("no link to d", {"decode_incarnation": 1}),
    ("no link to x", {"decode_worker_id": "x"}),
    ("malformed", {"generations": [1]}),
    ("malformed", {"block_ids": [0] * 70000, "generations": [1] * 70000}),
    ("malformed", {"ticket_id": 2**64 - 1}),
    ("malformed", {"ticket_id": 0}),
    ("asks for blocks", {"first_ordinal": 3}),
    ("asks for blocks", {"first_ordinal": 2**32 - 1}),
    ("asks for blocks", {"block_ids": [0, 1], "generations": [1, 1]}),
    ("asks for blocks", {"block_ids": [2**31] * 60000, "generations": [1] * 60000}),
]


async def test_forged_ticket_fails_the_request() -> None:
    async with worker_pair() as pair:
        for attempt, (reason, forged) in enumerate(FORGERIES):
            ask = replace(ASK, attempt=attempt, prompt=prompt_of(40, salt=attempt))
            ticket = await ticket_for(pair, ask)
            forge(ticket, forged)
            pair.prefill.hand_off(ask, ticket)
            assert reason in await pair.prefill.router.failed(ask), str(forged)[:40]
            for node in pair.nodes:
                node.abort(ask)
            await pair.whole()
        again = replace(ASK, attempt=len(FORGERIES))
        assert await pair.run(again) == again.expected


def forge(ticket: pb.Ticket, forged: dict[str, Any]) -> None:
    for name, value in forged.items():
        if isinstance(value, list):
            del getattr(ticket, name)[:]
            getattr(ticket, name).extend(value)
        else:
            setattr(ticket, name, value)


async def test_foreign_block_ids_are_not_used() -> None:
    """Where a block lands is decided by the receives of its owner; the ids in a ticket are only counted."""
    async with worker_pair() as pair:
        ticket = await ticket_for(pair)
        ticket.block_ids[:] = [2**31] * len(ticket.block_ids)
        pair.prefill.hand_off(ASK, ticket)
        await pair.decode.router.finished(ASK)
        assert [e.token_id for node in pair.nodes for e in node.router.events(ASK)] == ASK.expected


async def test_stale_generation_is_refused_by_the_receiver() -> None:
    async with worker_pair() as pair:
        ticket = await ticket_for(pair)
        ticket.generations[4] += 1
        pair.prefill.hand_off(ASK, ticket)
        assert await pair.decode.router.failed(ASK) == "block 4 of the ticket has the wrong generation"
        await all_over(pair)


async def test_another_requests_ticket_is_refused_by_the_receiver() -> None:
    """Two hand-overs with the same number of blocks get each other's tickets."""
    async with worker_pair() as pair:
        other = Ask("other", prompt_of(38, salt=2), output=(1, 2))
        tickets = [await ticket_for(pair), await ticket_for(pair, other)]
        assert len(tickets[0].block_ids) == len(tickets[1].block_ids)
        pair.prefill.hand_off(ASK, tickets[1])
        pair.prefill.hand_off(other, tickets[0])
        await pair.decode.router.failed(ASK)
        await pair.decode.router.failed(other)
        for node in pair.nodes:
            node.abort(other)
        await all_over(pair)


async def test_second_ticket_for_one_push_is_an_error() -> None:
    async with worker_pair() as pair:
        with pair.faults.on(blocks, Fault(delay_s=HELD)):
            ticket = await pair.hand_over(ASK)
            await eventually(lambda: sent(pair, 11), "not all is sent")
            ticket.ticket_id += 1
            pair.prefill.hand_off(ASK, ticket)
            assert "another ticket" in await pair.prefill.router.failed(ASK)
        assert (await pair.prefill.ledger())["by_state"]["sending"] == 10, "given back while it is read"
        pair.prefill.transport.let_go()
        await all_over(pair)


async def test_hand_off_for_nobody_is_ignored() -> None:
    async with worker_pair() as pair:
        ticket = await ticket_for(pair)
        pair.prefill.hand_off(Ask("nobody", (1,)), ticket)
        pair.decode.hand_off(ASK, ticket)
        pair.prefill.hand_off(ASK, ticket)
        await pair.decode.router.finished(ASK)
        assert [e.token_id for node in pair.nodes for e in node.router.events(ASK)] == ASK.expected


async def sent(pair: Pair, count: int) -> bool:
    return len(pair.faults.seen) == count
