"""A request that is aborted, or whose router is lost, in any phase leaves both pools whole and the link in use."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from kvstore.transfer.loopback import Fault
from kvstore.transfer.tags import MANIFEST
from pdserve.protocol import worker_pb2 as pb
from tests.support.router_client import Ask
from tests.support.tiny_engine import BLOCK_SIZE
from tests.support.worker_pair import (
    HELD,
    Pair,
    blocks,
    eventually,
    manifests,
    prompt_of,
    shorter,
    worker_pair,
)

# Three chunks of 16, 16 and 8 tokens.
ASK = Ask("r", prompt_of(40))
PhaseOf = Callable[[Pair], Awaitable[None]]


async def chunks(pair: Pair, passed: int) -> None:
    """Prefill stands before the next chunk of the request."""
    pair.prefill.gate.close()
    pair.prefill.submit(ASK)
    for _ in range(passed):
        await pair.prefill.gate.reached()
        pair.prefill.gate.pass_step()


async def reserved(pair: Pair) -> pb.Ticket:
    await pair.prefill.router.wanted(ASK)
    pair.decode.reserve(ASK, pair.prefill)
    return await pair.decode.router.reserved(ASK)


async def sent(pair: Pair, *ordinals: int) -> None:
    async def all_sent() -> bool:
        return pair.faults.seen == list(ordinals)

    await eventually(all_sent, f"sent {pair.faults.seen}")


async def queued(pair: Pair) -> None:
    pair.prefill.gate.close()
    pair.prefill.submit(Ask("before", prompt_of(16, salt=5), max_tokens=2), disaggregated=False)
    await pair.prefill.gate.reached()
    pair.prefill.submit(ASK)


async def prefilling(pair: Pair) -> None:
    await chunks(pair, 1)
    await pair.prefill.gate.reached()


async def in_the_last_chunk(pair: Pair) -> None:
    await chunks(pair, 2)
    await pair.prefill.router.wanted(ASK)


async def waiting_for_a_ticket(pair: Pair) -> None:
    pair.prefill.submit(ASK)
    await pair.prefill.router.event(ASK)


async def ticket_not_delivered(pair: Pair) -> None:
    pair.prefill.submit(ASK)
    await reserved(pair)


async def nothing_sent(pair: Pair) -> None:
    """The ticket asks for what is still being computed."""
    pair.decode.submit(Ask("held", ASK.prompt[:32]), disaggregated=False)
    await pair.decode.router.finished(Ask("held", ()))
    await chunks(pair, 2)
    pair.prefill.hand_off(ASK, await reserved(pair))


async def half_sent(pair: Pair) -> None:
    await chunks(pair, 2)
    pair.prefill.hand_off(ASK, await reserved(pair))
    await sent(pair, *range(8))


async def transferring(pair: Pair) -> None:
    pair.faults.rules.append((blocks, Fault(delay_s=HELD)))
    await pair.hand_over(ASK)
    await sent(pair, *range(10), MANIFEST)


async def manifest_on_its_way(pair: Pair) -> None:
    pair.faults.rules.append((manifests, Fault(delay_s=HELD)))
    await pair.hand_over(ASK)
    await sent(pair, *range(10), MANIFEST)


async def decoding(pair: Pair) -> None:
    pair.decode.gate.close()
    await pair.hand_over(ASK)
    await pair.decode.gate.reached()


async def streaming(pair: Pair) -> None:
    pair.decode.gate.close()
    await pair.hand_over(ASK)
    for number in range(2):
        await pair.decode.gate.reached()
        pair.decode.gate.pass_step()
        await pair.decode.router.event(ASK, number)
    await pair.decode.gate.reached()


async def over(pair: Pair) -> None:
    await pair.run(ASK)


PHASES = [
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


def release(pair: Pair) -> None:
    """Whatever the phase held back goes on."""
    pair.faults.rules.clear()
    for node in pair.nodes:
        node.gate.open()
        node.transport.let_go()


async def next_request(pair: Pair, attempt: int = 1) -> None:
    again = replace(ASK, attempt=attempt)
    assert await pair.run(again) == again.expected
    other = Ask("other", prompt_of(23, salt=9))
    assert await pair.run(other) == other.expected
    await pair.whole()


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("first", [0, 1], ids=["prefill first", "decode first"])
async def test_abort(phase: PhaseOf, first: int) -> None:
    async with worker_pair() as pair:
        num_tasks = len(asyncio.all_tasks())
        await phase(pair)
        for node in (pair.nodes[first], pair.nodes[1 - first]):
            node.abort(ASK)
            await node.heard()
        counts = [len(node.router.events(ASK)) for node in pair.nodes]
        release(pair)
        await pair.settled(num_tasks)
        assert [len(node.router.events(ASK)) for node in pair.nodes] == counts, "something came after the abort"
        await next_request(pair)
        assert pair.num_links_up == 1, "the link did not survive"


@pytest.mark.parametrize("phase", PHASES)
async def test_only_decode_is_aborted(phase: PhaseOf) -> None:
    """Prefill is told by the fence, or ends by its own deadline."""
    limits = shorter(handoff_s=0.2)
    async with worker_pair(prefill_options={"limits": limits}) as pair:
        num_tasks = len(asyncio.all_tasks())
        await phase(pair)
        pair.decode.abort(ASK)
        await pair.decode.heard()
        release(pair)
        await pair.settled(num_tasks)
        await next_request(pair)


@pytest.mark.parametrize("phase", PHASES)
async def test_only_prefill_is_aborted(phase: PhaseOf) -> None:
    """Decode does not hear of it, and ends by its own deadline."""
    async with worker_pair(limits=shorter(arrival_s=0.3)) as pair:
        num_tasks = len(asyncio.all_tasks())
        await phase(pair)
        pair.prefill.abort(ASK)
        await pair.prefill.heard()
        release(pair)
        await pair.settled(num_tasks)
        await next_request(pair)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("lost", ["p", "d", "pd"])
async def test_router_is_lost(phase: PhaseOf, lost: str) -> None:
    """Of the worker whose session holds, the router (another one than the lost) aborts the request."""
    async with worker_pair() as pair:
        num_tasks = len(asyncio.all_tasks())
        await phase(pair)
        for node in pair.nodes:
            if node.hello.worker_id in lost:
                await node.router.close()
            else:
                node.abort(ASK)
                await node.heard()
        release(pair)
        await pair.whole()
        for node in pair.nodes:
            if node.hello.worker_id in lost:
                await node.rejoin()
        if "p" in lost:
            pair.prefill.list_peers(pair.decode)
            await pair.prefill.router.link("d", up=True)
        await pair.settled(num_tasks)
        await next_request(pair)


@pytest.mark.parametrize("phase", [half_sent, transferring, manifest_on_its_way])
async def test_sends_that_never_end(phase: PhaseOf) -> None:
    """Neither side waits for ever: the link is closed under them, and dialled anew."""
    async with worker_pair(limits=shorter(drain_s=0.1, fence_s=0.1)) as pair:
        num_tasks = len(asyncio.all_tasks())
        if phase is half_sent:
            pair.faults.rules.append((blocks, Fault(delay_s=HELD)))
        await phase(pair)
        before = len(pair.prefill.router.messages)
        for node in pair.nodes:
            node.abort(ASK)
        pair.prefill.gate.open()
        pair.faults.rules.clear()
        await pair.prefill.router.link("d", up=True, since=before)
        await pair.settled(num_tasks)
        late = pair.network.dropped
        pair.prefill.transport.let_go()
        pair.prefill.transport.flush()
        assert pair.network.dropped == late, "a send outlived its link"
        await next_request(pair)


async def test_landing_after_the_abort_is_dropped_and_counted() -> None:
    async with worker_pair() as pair:
        await transferring(pair)
        pair.decode.abort(ASK)
        await pair.decode.heard()
        ledger = await pair.decode.ledger()
        assert ledger["by_state"]["quarantined"] == 40 // BLOCK_SIZE
        release(pair)
        await pair.whole()
        assert await pair.decode.metric("pdserve_late_landings_total") == 10
        assert pair.decode.engine.pool.visible_keys() == []


async def test_late_writer_does_not_harm_the_next_owner() -> None:
    """The blocks of an aborted request go to another one; what was sent to them comes only then."""
    async with worker_pair(num_blocks=12) as pair:
        with pair.faults.on(blocks, Fault(late=True)):
            await pair.hand_over(ASK)
            await sent(pair, *range(10), MANIFEST)
            for node in pair.nodes:
                node.abort(ASK)
            await pair.whole()
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
        await next_request(pair)
