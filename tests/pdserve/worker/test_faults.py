"""Messages that are dropped, doubled, damaged, cut or late give no wrong token, and both pools are whole afterwards."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest

from kvstore.transfer.loopback import Fault
from pdserve.protocol import worker_pb2 as pb
from tests.support.router_client import Ask
from tests.support.worker_pair import (
    HELD,
    Pair,
    blocks,
    check_stream,
    eventually,
    everything,
    manifests,
    prompt_of,
    shorter,
    worker_pair,
)

ASK = Ask("r", prompt_of(40))


def one_block(ordinal: int) -> bool:
    return ordinal == 7


WHICH = [one_block, blocks, manifests, everything]


async def router_retries(pair: Pair) -> None:
    """As the router does after an error: aborted everywhere, then a new attempt."""
    for node in pair.nodes:
        node.abort(ASK)
    await pair.whole()
    assert pair.decode.router.events(ASK)[-1].finish == pb.ERROR
    assert len(pair.decode.router.events(ASK)) == 1, "a token came from KV that was not verified"
    again = replace(ASK, attempt=1)
    assert await pair.run(again) == again.expected
    await pair.whole()


@pytest.mark.parametrize("harms", WHICH)
@pytest.mark.parametrize(
    "fault",
    [
        Fault(corrupt=True),
        Fault(truncate_to_bytes=5),
        Fault(truncate_to_bytes=0),
        Fault(corrupt=True, duplicate=True),
    ],
    ids=["corrupted", "truncated", "emptied", "corrupted twice"],
)
async def test_damage_is_found(harms: Callable[[int], bool], fault: Fault) -> None:
    async with worker_pair() as pair:
        with pair.faults.on(harms, fault):
            await pair.hand_over(ASK)
            reason = await pair.decode.router.failed(ASK)
        assert "checksum" in reason or "damaged" in reason or "manifest has" in reason
        await router_retries(pair)
        assert await pair.decode.metric("pdserve_transfer_failures_total") == 1
        assert pair.num_links_up == 1


@pytest.mark.parametrize("harms", WHICH)
async def test_drop_ends_with_the_deadline(harms: Callable[[int], bool]) -> None:
    async with worker_pair(limits=shorter(arrival_s=0.1)) as pair:
        with pair.faults.on(harms, Fault(drop=True)):
            await pair.hand_over(ASK)
            assert await pair.decode.router.failed(ASK) == "its blocks did not arrive in time"
        await pair.whole()
        assert pair.decode.engine.pool.visible_keys() == [], "blocks became visible that were not verified"


async def test_retry_after_a_drop() -> None:
    async with worker_pair(limits=shorter(arrival_s=0.5)) as pair:
        with pair.faults.on(one_block, Fault(drop=True)):
            await pair.hand_over(ASK)
            await pair.decode.router.failed(ASK)
        await router_retries(pair)


async def has_sent(pair: Pair, count: int) -> bool:
    return len(pair.faults.seen) == count


@pytest.mark.parametrize("harms", WHICH)
async def test_duplicates_change_nothing(harms: Callable[[int], bool]) -> None:
    async with worker_pair() as pair:
        with pair.faults.on(harms, Fault(duplicate=True)):
            for attempt in range(3):
                ask = replace(ASK, prompt=prompt_of(40, salt=attempt), attempt=attempt)
                assert await pair.run(ask) == ask.expected
        await pair.whole()


@pytest.mark.parametrize("harms", WHICH)
async def test_late_messages_are_waited_for(harms: Callable[[int], bool]) -> None:
    async with worker_pair() as pair:
        with pair.faults.on(harms, Fault(late=True)):
            await pair.hand_over(ASK)
            await eventually(lambda: has_sent(pair, 11), "not all is sent")
            await pair.decode.heard()
            assert pair.decode.router.events(ASK) == []
        pair.network.release_late()
        await pair.decode.router.finished(ASK)
        events = [event for node in pair.nodes for event in node.router.events(ASK)]
        assert check_stream(events, 0) == ASK.expected
        await pair.whole()


@pytest.mark.parametrize("harms", WHICH)
async def test_messages_after_the_deadline_are_dropped(harms: Callable[[int], bool]) -> None:
    async with worker_pair(limits=shorter(arrival_s=0.5)) as pair:
        with pair.faults.on(harms, Fault(late=True)):
            await pair.hand_over(ASK)
            assert await pair.decode.router.failed(ASK) == "its blocks did not arrive in time"
            await pair.whole()
        other = replace(ASK, prompt=prompt_of(40, salt=1), attempt=1)
        pair.decode.gate.close()
        await pair.hand_over(other)
        await pair.decode.gate.reached()
        pair.network.release_late()
        pair.decode.gate.open()
        await pair.decode.router.finished(other)
        events = [event for node in pair.nodes for event in node.router.events(other)]
        assert check_stream(events, 0) == other.expected
        await pair.whole()


async def test_manifest_overtakes_the_blocks() -> None:
    async with worker_pair() as pair:
        with pair.faults.on(blocks, Fault(delay_s=HELD)):
            await pair.hand_over(ASK)
            await eventually(lambda: has_sent(pair, 11), "not all is sent")
        pair.prefill.transport.let_go()
        await pair.decode.router.finished(ASK)
        events = [event for node in pair.nodes for event in node.router.events(ASK)]
        assert check_stream(events, 0) == ASK.expected


async def test_prefill_gives_up_when_sends_do_not_end() -> None:
    """The router hears of it from both sides, and the next attempt goes over a new link."""
    async with worker_pair(limits=shorter(handoff_s=0.5, drain_s=0.1, arrival_s=1.0)) as pair:
        before = len(pair.prefill.router.messages)
        with pair.faults.on(blocks, Fault(delay_s=HELD)):
            await pair.hand_over(ASK)
            await pair.prefill.router.wait(lambda _: has_error(pair, 0))
            await pair.decode.router.wait(lambda _: has_error(pair, 1))
        await pair.whole()
        await pair.prefill.router.link("d", up=False, since=before)
        await pair.prefill.router.link("d", up=True, since=before)
        again = replace(ASK, attempt=1)
        assert await pair.run(again) == again.expected


def has_error(pair: Pair, number: int) -> bool | None:
    return any(event.finish == pb.ERROR for event in pair.nodes[number].router.events(ASK)) or None


@pytest.mark.parametrize("seed", range(4))
async def test_random_faults_under_load(seed: int) -> None:
    """Each request ends with the undisturbed stream or with an error, and nothing is left behind."""
    kinds = [Fault(drop=True), Fault(corrupt=True), Fault(duplicate=True), Fault(truncate_to_bytes=3), Fault(late=True)]
    limits = shorter(arrival_s=0.5, fence_s=0.3)
    limits = replace(limits, link=replace(limits.link, check_s=0.05))
    async with worker_pair(num_blocks=48, limits=limits) as pair:
        num_tasks = len(asyncio.all_tasks())
        state = seed

        def picks(ordinal: int) -> bool:
            nonlocal state
            state = (state * 1103515245 + 12345) % 2**31
            return state // 65536 % 12 == 0

        for fault in kinds:
            pair.faults.rules.append((picks, fault))
        asks = [Ask(f"r{n}", prompt_of(7 + 5 * (n % 6), salt=n), temperature=1.0) for n in range(18)]
        for start in range(0, len(asks), 6):
            await asyncio.gather(*(end_of(pair, ask) for ask in asks[start : start + 6]))
            pair.network.release_late()
        pair.faults.rules.clear()
        await pair.settled(num_tasks)
        await link_is_back(pair)
        ask = Ask("last", prompt_of(39, salt=40))
        assert await pair.run(ask) == ask.expected


async def link_is_back(pair: Pair) -> None:
    """Decode has a link to prefill: it reserves."""
    attempts = itertools.count()

    async def reserves() -> bool:
        ask = Ask("is it back", (1,), attempt=next(attempts))
        pair.decode.reserve(ask, pair.prefill)
        ticket = await pair.decode.router.wait(lambda message: answer_to(message, ask))
        pair.decode.abort(ask)
        return bool(ticket.ticket_id)

    await eventually(reserves, "the link does not come back")


async def end_of(pair: Pair, ask: Ask) -> None:
    """Tokens are a prefix of the undisturbed stream, all of it unless the request failed."""
    pair.prefill.submit(ask)
    await pair.prefill.router.wanted(ask)
    pair.decode.reserve(ask, pair.prefill)
    ticket = await pair.decode.router.wait(lambda message: answer_to(message, ask))
    if ticket.ticket_id:  # else refused: a link that was closed is not back yet
        pair.prefill.hand_off(ask, ticket)
        end = await pair.decode.router.finished(ask)
        events = [event for node in pair.nodes for event in node.router.events(ask) if not event.no_token]
        tokens = [event.token_id for event in sorted(events, key=lambda event: event.index)]
        assert tokens == ask.expected[: len(tokens)]
        assert end.finish == pb.ERROR or tokens == ask.expected
    for node in pair.nodes:
        node.abort(ask)


def answer_to(message: pb.WorkerMessage, ask: Ask) -> pb.Ticket | None:
    """An empty ticket for a refusal."""
    answer = message.reserved if message.HasField("reserved") else message.refused
    about = (answer.request_id, answer.attempt) == (ask.request_id, ask.attempt)
    return message.reserved.ticket if about else None
