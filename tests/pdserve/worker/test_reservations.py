"""Reservations wait in order for room, are retried when some appears, and are refused in time otherwise."""

from __future__ import annotations

import time
from dataclasses import replace

from pdserve.protocol import worker_pb2 as pb
from tests.support.router_client import Ask
from tests.support.worker_pair import Pair, check_stream, prompt_of, shorter, worker_pair

# On a pool of 12 blocks of 4 tokens: this leaves room for small ones only.
HOG = Ask("hog", prompt_of(30, salt=8), max_tokens=3)
LARGE = Ask("large", prompt_of(26))
SMALL = Ask("small", prompt_of(3, salt=1))


async def fill(pair: Pair) -> None:
    """Decode's pool is taken by a request that stands before its next step."""
    pair.decode.gate.close()
    pair.decode.submit(HOG, disaggregated=False)
    for _ in range(2):
        await pair.decode.gate.reached()
        pair.decode.gate.pass_step()
    await pair.decode.router.event(HOG)
    await pair.decode.gate.reached()


async def ask_for(pair: Pair, *asks: Ask) -> None:
    for ask in asks:
        pair.prefill.submit(ask)
        await pair.prefill.router.wanted(ask)
        pair.decode.reserve(ask, pair.prefill)


async def finish(pair: Pair, *asks: Ask) -> None:
    for ask in asks:
        pair.prefill.hand_off(ask, await pair.decode.router.reserved(ask))
    for ask in asks:
        await pair.decode.router.finished(ask)
        events = [event for node in pair.nodes for event in node.router.events(ask)]
        assert check_stream(events, 0) == ask.expected
    await pair.whole()


def answered(pair: Pair) -> list[str]:
    """The requests whose reservation was answered, in order."""
    kinds = [(message, message.WhichOneof("body")) for message in pair.decode.router.messages]
    return [getattr(message, kind).request_id for message, kind in kinds if kind in ("reserved", "refused")]


def pending(pair: Pair) -> int:
    loads = [m.load for m in pair.decode.router.messages if m.WhichOneof("body") == "load"]
    return loads[-1].pending_reservations


async def test_waits_for_room() -> None:
    async with worker_pair(num_blocks=12) as pair:
        await fill(pair)
        await ask_for(pair, LARGE)
        await pair.decode.heard()
        assert answered(pair) == []
        pair.decode.gate.open()
        await finish(pair, LARGE)


async def test_order_is_kept() -> None:
    async with worker_pair(num_blocks=12) as pair:
        await fill(pair)
        await ask_for(pair, LARGE, SMALL)
        pair.decode.gate.open()
        await finish(pair, LARGE, SMALL)
        assert answered(pair) == ["large", "small"]


async def test_refused_after_the_limit() -> None:
    async with worker_pair(num_blocks=12, limits=shorter(reservation_s=0.1)) as pair:
        await fill(pair)
        began_s = time.monotonic()
        await ask_for(pair, LARGE, SMALL)
        assert await pair.decode.router.refused(LARGE) == "no room for the sequence in time"
        assert await pair.decode.router.refused(SMALL) == "no room for the sequence in time"
        assert time.monotonic() - began_s >= 0.1
        for node in pair.nodes:
            for ask in (LARGE, SMALL):
                node.abort(ask)
        pair.decode.gate.open()
        await pair.whole()
        assert pair.decode.router.events(LARGE) == []


async def test_refused_reservation_may_be_asked_again_at_once() -> None:
    """As the router does: abort, then the same attempt again, while the engine has yet to answer the first."""
    async with worker_pair(num_blocks=12, limits=shorter(reservation_s=0.5)) as pair:
        await fill(pair)
        await ask_for(pair, SMALL)
        await pair.decode.router.refused(SMALL)
        pair.decode.abort(SMALL)
        pair.decode.reserve(SMALL, pair.prefill)
        await pair.decode.heard()
        pair.decode.gate.open()
        await finish(pair, SMALL)


async def test_aborted_while_it_waits() -> None:
    async with worker_pair(num_blocks=12, limits=shorter(reservation_s=0.5)) as pair:
        await fill(pair)
        await ask_for(pair, LARGE, SMALL)
        for node in pair.nodes:
            node.abort(LARGE)
        await pair.decode.heard()
        pair.decode.gate.open()
        await finish(pair, SMALL)
        await pair.decode.router.until(lambda: True if pending(pair) == 0 else None)
        assert answered(pair) == ["small"]


async def test_second_in_line_is_aborted() -> None:
    """Nothing is said about it any more, not even when its time is over."""
    async with worker_pair(num_blocks=12, limits=shorter(reservation_s=0.1)) as pair:
        await fill(pair)
        await ask_for(pair, LARGE, SMALL)
        for node in pair.nodes:
            node.abort(SMALL)
        await pair.decode.router.refused(LARGE)
        await pair.decode.heard()
        assert answered(pair) == ["large"]
        pair.prefill.abort(LARGE)
        pair.decode.gate.open()
        await pair.whole()


async def test_more_than_the_cap_are_refused() -> None:
    async with worker_pair(num_blocks=12, limits=shorter(reservations=2)) as pair:
        await fill(pair)
        asks = [replace(LARGE, request_id=f"r{n}") for n in range(3)]
        await ask_for(pair, *asks)
        assert await pair.decode.router.refused(asks[2]) == "2 reservations are waiting for room"
        for node in pair.nodes:
            for ask in asks:
                node.abort(ask)
        pair.decode.gate.open()
        await pair.whole()


async def test_deadline_of_the_request_while_it_waits() -> None:
    async with worker_pair(num_blocks=12) as pair:
        await fill(pair)
        late = replace(LARGE, remaining_s=0.15)
        await ask_for(pair, late)
        assert await pair.decode.router.failed(late) == "the request's deadline has passed"
        assert await pair.prefill.router.until(lambda: ended_on_prefill(pair, late))
        pair.decode.gate.open()
        await pair.whole()


def ended_on_prefill(pair: Pair, ask: Ask) -> bool | None:
    return any(event.finish == pb.ERROR for event in pair.prefill.router.events(ask)) or None


async def test_unlinked_prefill_is_refused_at_once() -> None:
    async with worker_pair() as pair:
        pair.decode.router.send(
            reserve=pb.Reserve(request=LARGE.submit(), prefill_worker_id="p", prefill_incarnation=1)
        )
        assert await pair.decode.router.refused(LARGE) == "no link to p"
        await pair.whole()


async def test_full_queue_of_prompts_refuses() -> None:
    async with worker_pair(max_waiting=2) as pair:
        pair.prefill.gate.close()
        asks = [Ask(f"r{n}", prompt_of(30, salt=n)) for n in range(4)]
        pair.prefill.submit(asks[0])
        await pair.prefill.gate.reached()
        for ask in asks[1:]:
            pair.prefill.submit(ask)
        await pair.prefill.heard()
        pair.prefill.gate.pass_step()
        assert await pair.prefill.router.refused(asks[3]) == "the queue of this worker is full"
        for ask in asks:
            pair.prefill.abort(ask)
        pair.prefill.gate.open()
        await pair.whole()
