"""A request that is handed over gives the undisturbed stream, and only the blocks that decode is missing travel."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from kvstore.transfer.loopback import LoopbackNetwork
from kvstore.transfer.tags import MANIFEST
from pdserve.protocol import worker_pb2 as pb
from pdserve.worker.config import Role
from tests.support.router_client import Ask
from tests.support.tiny_engine import BLOCK_SIZE
from tests.support.worker_pair import (
    Node,
    check_stream,
    eventually,
    prompt_of,
    running_node,
    worker_pair,
)


def cached_tokens(event: pb.TokenEvent) -> int:
    return sum(event.cached_by_tier.values())


async def run_whole(node: Node, ask: Ask) -> list[int]:
    node.submit(ask, disaggregated=False)
    await node.router.finished(ask)
    return [*ask.output, *check_stream(node.router.events(ask), len(ask.output))]


async def test_streams_of_all_lengths_are_undisturbed() -> None:
    async with worker_pair() as pair:
        for length in (1, 3, 4, 5, 15, 16, 17, 33, 48):
            ask = Ask(f"r{length}", prompt_of(length, salt=length))
            assert await pair.run(ask) == ask.expected, length
            sent = [*range(-(-length // BLOCK_SIZE)), MANIFEST]
            assert pair.faults.seen == sent, length
            pair.faults.seen.clear()
        await pair.whole()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_concurrent_requests_do_not_mix(temperature: float) -> None:
    async with worker_pair(num_blocks=64) as pair:
        asks = [Ask(f"r{n}", prompt_of(3 + 5 * n, salt=n), temperature=temperature) for n in range(8)]
        outputs = await asyncio.gather(*map(pair.run, asks))
        assert outputs == [ask.expected for ask in asks]
        await pair.whole()


async def test_more_requests_than_fit_run_one_after_the_other() -> None:
    async with worker_pair(num_blocks=16, sequences=4) as pair:
        asks = [Ask(f"r{n}", prompt_of(14 + n, salt=n)) for n in range(10)]
        outputs = await asyncio.gather(*map(pair.run, asks))
        assert outputs == [ask.expected for ask in asks]
        await pair.whole()


@pytest.mark.parametrize("length", [13, 16])
async def test_only_missing_blocks_travel(length: int) -> None:
    async with worker_pair() as pair:
        first = Ask("first", prompt_of(length))
        assert await pair.run(first) == first.expected
        pair.faults.seen.clear()
        longer = Ask("longer", (*first.prompt, *prompt_of(10, salt=1)))
        assert await pair.run(longer) == longer.expected
        ticket = await pair.decode.router.reserved(longer)
        held = length // BLOCK_SIZE
        assert ticket.first_ordinal == held
        assert len(ticket.block_ids) == -(-(length + 10) // BLOCK_SIZE) - held
        assert pair.faults.seen == [*range(len(ticket.block_ids)), MANIFEST]
        await pair.whole()


async def test_next_turn_moves_no_block_of_the_last_answer() -> None:
    """Decode holds what it generated; the next turn's ticket starts behind it."""
    async with worker_pair() as pair:
        turn = Ask("turn", prompt_of(10), max_tokens=15)
        answer = await pair.run(turn)
        following = Ask("following", (*turn.prompt, *answer, *prompt_of(5, salt=2)))
        assert await pair.run(following) == following.expected
        ticket = await pair.decode.router.reserved(following)
        assert ticket.first_ordinal == (10 + 15 - 1) // BLOCK_SIZE


async def test_nothing_is_missing() -> None:
    async with worker_pair() as pair:
        for attempt in range(2):
            ask = Ask("r", prompt_of(16), attempt=attempt)
            assert await pair.run(ask) == ask.expected
        ticket = await pair.decode.router.reserved(ask)
        assert (ticket.first_ordinal, list(ticket.block_ids)) == (4, [])
        assert pair.faults.seen == [0, 1, 2, 3, MANIFEST, MANIFEST]
        await pair.whole()


async def test_earlier_chunks_travel_while_the_last_is_computed() -> None:
    async with worker_pair(tokens=16) as pair:
        pair.prefill.gate.close()
        ask = Ask("r", prompt_of(40))
        pair.prefill.submit(ask)
        for _ in range(2):
            pair.prefill.gate.pass_step()
        await pair.prefill.router.wanted(ask)
        await pair.prefill.gate.reached()
        pair.decode.reserve(ask, pair.prefill)
        ticket = await pair.decode.router.reserved(ask)
        pair.prefill.hand_off(ask, ticket)

        async def sent() -> bool:
            return pair.faults.seen == list(range(32 // BLOCK_SIZE))

        await eventually(sent, f"sent {pair.faults.seen}")
        assert pair.prefill.router.events(ask) == []
        assert (await pair.decode.ledger())["by_state"]["receiving"] == 40 // BLOCK_SIZE
        pair.prefill.gate.open()
        await pair.decode.router.finished(ask)
        events = [*pair.prefill.router.events(ask), *pair.decode.router.events(ask)]
        assert check_stream(events, 0) == ask.expected
        await pair.whole()


@pytest.mark.parametrize("delivered", [1, 4])
async def test_resumed_request_goes_on(delivered: int) -> None:
    async with worker_pair() as pair:
        whole = Ask("r", prompt_of(9), max_tokens=8, temperature=1.0)
        resumed = replace(whole, attempt=1, output=tuple(whole.expected[:delivered]))
        assert await pair.run(resumed) == whole.expected
        again = replace(resumed, attempt=2)
        assert await run_whole(pair.decode, again) == whole.expected
        await pair.whole()


async def test_cached_tokens_are_told_with_the_first_token() -> None:
    async with worker_pair() as pair:
        for attempt, cached in enumerate((0, 12)):
            ask = Ask("handed over", prompt_of(14), attempt=attempt)
            await pair.run(ask)
            assert cached_tokens(await pair.prefill.router.event(ask)) == cached
            assert {cached_tokens(event) for event in pair.decode.router.events(ask)} == {0}
        ask = Ask("whole", prompt_of(14))
        await run_whole(pair.decode, ask)
        assert [cached_tokens(event) for event in pair.decode.router.events(ask)] == [12, 0, 0, 0, 0, 0]


async def test_times_of_each_phase_are_told_once() -> None:
    async with worker_pair() as pair:
        ask = Ask("r", prompt_of(20))
        await pair.run(ask)
        (first,), (second, *later) = pair.prefill.router.events(ask), pair.decode.router.events(ask)
        assert first.times.compute_s > 0
        assert second.times.transfer_s > 0
        assert second.times.reserve_s > 0
        assert (second.times.queue_s, second.times.compute_s) == (0, 0)
        assert not any(event.HasField("times") for event in later)


@pytest.mark.parametrize("role", Role)
async def test_every_role_runs_whole_requests(role: Role) -> None:
    async with running_node(LoopbackNetwork(), "w", role) as node:
        asks = [Ask(f"r{n}", prompt_of(1 + 9 * n, salt=n)) for n in range(4)]
        outputs = await asyncio.gather(*(run_whole(node, ask) for ask in asks))
        assert outputs == [ask.expected for ask in asks]


@pytest.mark.parametrize("stop", [True, False])
async def test_first_token_is_the_last(stop: bool) -> None:
    """Prefill ends the request; the router aborts what decode has reserved."""
    async with worker_pair() as pair:
        ask = Ask("r", prompt_of(40), max_tokens=8 if stop else 1)
        if stop:
            ask = replace(ask, stop_token_ids=(ask.expected[0],))
        pair.prefill.gate.close()
        pair.prefill.submit(ask)
        for _ in range(2):
            pair.prefill.gate.pass_step()
        await pair.prefill.router.wanted(ask)
        pair.decode.reserve(ask, pair.prefill)
        pair.prefill.hand_off(ask, await pair.decode.router.reserved(ask))
        pair.prefill.gate.open()
        event = await pair.prefill.router.finished(ask)
        assert (event.index, event.token_id) == (0, ask.expected[0])
        assert event.finish == (pb.STOP if stop else pb.LENGTH)
        pair.decode.abort(ask)
        await pair.whole()
        assert pair.decode.router.events(ask) == []
        following = Ask("following", prompt_of(21, salt=3))
        assert await pair.run(following) == following.expected


async def test_same_attempt_twice_is_one_request() -> None:
    async with worker_pair() as pair:
        ask = Ask("r", prompt_of(20))
        pair.prefill.gate.close()
        pair.prefill.submit(ask)
        pair.prefill.submit(ask)
        pair.prefill.gate.open()
        await pair.prefill.router.wanted(ask)
        for _ in range(2):
            pair.decode.reserve(ask, pair.prefill)
        pair.prefill.hand_off(ask, await pair.decode.router.reserved(ask))
        await pair.decode.router.finished(ask)
        events = [*pair.prefill.router.events(ask), *pair.decode.router.events(ask)]
        assert check_stream(events, 0) == ask.expected
        await pair.whole()


async def test_tickets_given_to_each_others_prompts_fail_both_and_never_swap_their_kv() -> None:
    """Equal counts and right checksums: only what the manifest says it is about tells them apart."""
    async with worker_pair() as pair:
        asks = [Ask(f"r{n}", prompt_of(10, salt=n)) for n in range(2)]
        for ask in asks:
            pair.prefill.submit(ask)
            await pair.prefill.router.wanted(ask)
            pair.decode.reserve(ask, pair.prefill)
        tickets = [await pair.decode.router.reserved(ask) for ask in asks]
        for ask, ticket in zip(asks, reversed(tickets), strict=True):
            pair.prefill.hand_off(ask, ticket)
        for ask in asks:
            assert "the KV of other tokens" in await pair.decode.router.failed(ask)
            pair.prefill.abort(ask)
        await pair.whole()
