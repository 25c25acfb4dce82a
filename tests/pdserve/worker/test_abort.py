"""A request that is aborted, or whose router is lost, in any phase leaves both pools whole and the link in use."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import pytest

from kvstore.transfer.loopback import Fault
from kvstore.transfer.tags import MANIFEST
from pdserve.protocol import worker_pb2 as pb
from tests.support.router_client import Ask, RouterClient
from tests.support.tiny_engine import BLOCK_SIZE
from tests.support.worker_pair import (
    HELD,
    Node,
    Pair,
    blocks,
    eventually,
    manifests,
    prompt_of,
    shorter,
    worker_pair,
)

PhaseOf = Callable[[Pair, Ask], Awaitable[None]]


def ask_for(phase: PhaseOf) -> Ask:
    """Three chunks of 16, 16 and 8 tokens, which no other phase has in common with it."""
    return Ask(phase.__name__, prompt_of(40, salt=PHASES.index(phase)))


async def chunks(pair: Pair, ask: Ask, passed: int) -> None:
    """Prefill stands before the next chunk of the request."""
    pair.prefill.gate.close()
    pair.prefill.submit(ask)
    for _ in range(passed):
        await pair.prefill.gate.reached()
        pair.prefill.gate.pass_step()


async def reserved(pair: Pair, ask: Ask) -> pb.Ticket:
    await pair.prefill.router.wanted(ask)
    pair.decode.reserve(ask, pair.prefill)
    return await pair.decode.router.reserved(ask)


async def sent(pair: Pair, *ordinals: int) -> None:
    async def all_sent() -> bool:
        return pair.faults.seen == list(ordinals)

    await eventually(all_sent, f"sent {pair.faults.seen}")


async def queued(pair: Pair, ask: Ask) -> None:
    pair.prefill.gate.close()
    pair.prefill.submit(Ask("before", prompt_of(16, salt=30), max_tokens=2), disaggregated=False)
    await pair.prefill.gate.reached()
    pair.prefill.submit(ask)


async def prefilling(pair: Pair, ask: Ask) -> None:
    await chunks(pair, ask, 1)
    await pair.prefill.gate.reached()


async def in_the_last_chunk(pair: Pair, ask: Ask) -> None:
    await chunks(pair, ask, 2)
    await pair.prefill.router.wanted(ask)


async def waiting_for_a_ticket(pair: Pair, ask: Ask) -> None:
    pair.prefill.submit(ask)
    await pair.prefill.router.event(ask)


async def ticket_not_delivered(pair: Pair, ask: Ask) -> None:
    pair.prefill.submit(ask)
    await reserved(pair, ask)


async def nothing_sent(pair: Pair, ask: Ask) -> None:
    """The ticket asks for what is still being computed."""
    pair.decode.submit(Ask("held", ask.prompt[:32]), disaggregated=False)
    await pair.decode.router.finished(Ask("held", ()))
    await chunks(pair, ask, 2)
    pair.prefill.hand_off(ask, await reserved(pair, ask))


async def half_sent(pair: Pair, ask: Ask) -> None:
    await chunks(pair, ask, 2)
    pair.prefill.hand_off(ask, await reserved(pair, ask))
    await sent(pair, *range(8))


async def transferring(pair: Pair, ask: Ask) -> None:
    pair.faults.rules.append((blocks, Fault(delay_s=HELD)))
    await pair.hand_over(ask)
    await sent(pair, *range(10), MANIFEST)


async def manifest_on_its_way(pair: Pair, ask: Ask) -> None:
    pair.faults.rules.append((manifests, Fault(delay_s=HELD)))
    await pair.hand_over(ask)
    await sent(pair, *range(10), MANIFEST)


async def decoding(pair: Pair, ask: Ask) -> None:
    pair.decode.gate.close()
    await pair.hand_over(ask)
    await pair.decode.gate.reached()


async def streaming(pair: Pair, ask: Ask) -> None:
    pair.decode.gate.close()
    await pair.hand_over(ask)
    for number in range(2):
        await pair.decode.gate.reached()
        pair.decode.gate.pass_step()
        await pair.decode.router.event(ask, number)
    await pair.decode.gate.reached()


async def over(pair: Pair, ask: Ask) -> None:
    await pair.run(ask)


PHASES: list[PhaseOf] = [
    queued,
    prefilling,
    in_the_last_chunk,
    waiting_for_a_ticket,
    ticket_not_delivered,
    nothing_sent,
    half_sent,
    transferring,
    manifest_on_its_way,
    decoding,
    streaming,
    over,
]
WITH_A_TICKET = PHASES[4:]


def release(pair: Pair) -> None:
    """Whatever the phase held back goes on."""
    pair.faults.rules.clear()
    for node in pair.nodes:
        node.gate.open()
        node.transport.let_go()


async def next_request(pair: Pair, ask: Ask) -> None:
    again = replace(ask, attempt=ask.attempt + 1)
    assert await pair.run(again) == again.expected
    other = Ask(f"after {ask.request_id}", prompt_of(23, salt=31))
    assert await pair.run(other) == other.expected
    await pair.whole()


async def in_each_phase(pair: Pair, act: Callable[[Ask], Awaitable[None]], phases: Sequence[PhaseOf] = PHASES) -> None:
    """Bring a request to the phase, act, let go what is held back: all is whole, and the next requests succeed."""
    for phase in phases:
        ask = ask_for(phase)
        num_tasks = len(asyncio.all_tasks())
        pair.faults.seen.clear()
        try:
            await phase(pair, ask)
            await act(ask)
            release(pair)
            await pair.settled(num_tasks)
            await next_request(pair, ask)
        except BaseException as error:
            error.add_note(f"in phase {phase.__name__}")
            raise


async def abort(ask: Ask, *nodes: Node) -> None:
    for node in nodes:
        node.abort(ask)
        await node.heard()


@pytest.mark.parametrize("first", [0, 1], ids=["prefill first", "decode first"])
async def test_abort(first: int) -> None:
    async with worker_pair() as pair:
        streams: dict[str, list[int]] = {}

        def lengths(ask: Ask) -> list[int]:
            return [len(node.router.events(ask)) for node in pair.nodes]

        async def act(ask: Ask) -> None:
            await abort(ask, pair.nodes[first], pair.nodes[1 - first])
            streams[ask.request_id] = lengths(ask)

        await in_each_phase(pair, act)
        for phase in PHASES:
            assert lengths(ask_for(phase)) == streams[phase.__name__], "something came after the abort"
        assert pair.num_links_up == 1, "the link did not survive"


async def test_only_decode_is_aborted() -> None:
    """Prefill is told by the fence, or ends by its own deadline."""
    async with worker_pair(prefill_options={"limits": shorter(handoff_s=1.0)}) as pair:
        await in_each_phase(pair, lambda ask: abort(ask, pair.decode), WITH_A_TICKET)


async def test_only_prefill_is_aborted() -> None:
    """Decode does not hear of it, and ends by its own deadline."""
    async with worker_pair(limits=shorter(arrival_s=0.5)) as pair:
        await in_each_phase(pair, lambda ask: abort(ask, pair.prefill), WITH_A_TICKET)


@pytest.mark.parametrize("lost", ["p", "d", "pd"])
async def test_router_is_lost(lost: str) -> None:
    """Of the worker whose session holds, the router (another one than the lost) aborts the request."""
    async with worker_pair(limits=shorter(fence_s=0.2)) as pair:

        async def act(ask: Ask) -> None:
            for node in pair.nodes:
                if node.hello.worker_id in lost:
                    await node.router.close()
                else:
                    await abort(ask, node)
            release(pair)
            await pair.whole()
            for node in pair.nodes:
                if node.hello.worker_id in lost:
                    await node.rejoin()
            if "p" in lost:
                pair.prefill.list_peers(pair.decode)
                await pair.prefill.router.link("d", up=True)

        await in_each_phase(pair, act)


@pytest.mark.parametrize("phase", [half_sent, transferring, manifest_on_its_way])
async def test_sends_that_never_end(phase: PhaseOf) -> None:
    """Neither side waits for ever: the link is closed under them, and dialled anew."""
    ask = ask_for(phase)
    async with worker_pair(limits=shorter(drain_s=0.1, fence_s=0.1)) as pair:
        num_tasks = len(asyncio.all_tasks())
        if phase is half_sent:
            pair.faults.rules.append((blocks, Fault(delay_s=HELD)))
        await phase(pair, ask)
        before = len(pair.prefill.router.messages)
        for node in pair.nodes:
            node.abort(ask)
        pair.prefill.gate.open()
        pair.faults.rules.clear()
        await pair.prefill.router.link("d", up=True, since=before)
        await pair.settled(num_tasks)
        late = pair.network.dropped
        pair.prefill.transport.let_go()
        pair.prefill.transport.flush()
        assert pair.network.dropped == late, "a send outlived its link"
        await next_request(pair, ask)


async def test_landing_after_the_abort_is_dropped_and_counted() -> None:
    async with worker_pair() as pair:
        ask = ask_for(transferring)
        await transferring(pair, ask)
        await abort(ask, pair.decode)
        ledger = await pair.decode.ledger()
        assert ledger["by_state"]["quarantined"] == 40 // BLOCK_SIZE
        release(pair)
        await pair.whole()
        assert await pair.decode.metric("pdserve_late_landings_total") == 10
        assert pair.decode.engine.pool.visible_keys() == []


async def test_late_writer_does_not_harm_the_next_owner() -> None:
    """The blocks of an aborted request go to another one once their link is closed; what was sent comes only then."""
    async with worker_pair(num_blocks=12, limits=shorter(fence_s=0.2)) as pair:
        ask = Ask("late", prompt_of(40))
        with pair.faults.on(blocks, Fault(late=True)):
            await pair.hand_over(ask)
            await sent(pair, *range(10), MANIFEST)
            await abort(ask, *pair.nodes)
            await pair.whole()
        await pair.linked_again(2)
        pair.decode.gate.close()
        other = Ask("other", prompt_of(40, salt=9))
        await pair.hand_over(other)
        await pair.decode.gate.reached()
        pair.network.release_late()
        pair.decode.gate.open()
        await pair.decode.router.finished(other)
        tokens = [event.token_id for node in pair.nodes for event in node.router.events(other)]
        assert tokens == other.expected
        await pair.whole()


async def test_abort_storm() -> None:
    """Requests of all lengths are aborted at every moment; nothing is left of them."""
    async with worker_pair(num_blocks=48) as pair:
        num_tasks = len(asyncio.all_tasks())

        async def run_and_abort(number: int) -> None:
            ask = Ask(f"r{number}", prompt_of(3 + number % 37, salt=number % 5), max_tokens=30)
            running = asyncio.create_task(pair.run(ask))
            for _ in range(number * 7 % 40):
                await asyncio.sleep(0)
            running.cancel()
            for node in pair.nodes:
                node.abort(ask)

        for start in range(0, 60, 6):
            await asyncio.gather(*(run_and_abort(number) for number in range(start, start + 6)))
        await pair.settled(num_tasks)
        await next_request(pair, Ask("last", prompt_of(40)))


async def test_a_router_cannot_abort_what_another_one_runs() -> None:
    async with worker_pair() as pair:
        node, ask = pair.prefill, Ask("mine", prompt_of(10))
        node.gate.close()
        node.submit(ask, disaggregated=False)
        await node.gate.reached()
        stranger = RouterClient(node.hello.address)
        await stranger.open()
        stranger.send(abort=pb.Abort(request_id=ask.request_id, attempt=ask.attempt))
        stranger.send(ping=pb.Ping(sequence=1))
        await stranger.wait(lambda message: message.pong.sequence or None)
        node.gate.open()
        assert (await node.router.finished(ask)).finish == pb.LENGTH
        await stranger.close()
        await pair.whole()
