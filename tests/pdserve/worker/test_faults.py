"""Messages that are dropped, doubled, damaged, cut or late give no wrong token, and both pools are whole afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import pytest

from kvstore.transfer.loopback import Fault
from pdserve.protocol import worker_pb2 as pb
from pdserve.worker.memory import HostBlocks
from tests.support.router_client import Ask
from tests.support.worker_pair import (
    HELD,
    Node,
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


def one_block(ordinal: int) -> bool:
    return ordinal == 7


WHICH = [one_block, blocks, manifests, everything]


def asks() -> Iterator[tuple[Callable[[int], bool], Ask]]:
    """For each choice of messages a request that shares nothing with the others."""
    for number, harms in enumerate(WHICH):
        yield harms, Ask(harms.__name__, prompt_of(40, salt=number))


async def router_retries(pair: Pair, ask: Ask) -> None:
    """As the router does after an error: aborted everywhere, then a new attempt."""
    for node in pair.nodes:
        node.abort(ask)
    await pair.whole()
    assert pair.decode.router.events(ask)[-1].finish == pb.ERROR
    assert len(pair.decode.router.events(ask)) == 1, "a token came from KV that was not verified"
    again = replace(ask, attempt=1)
    assert await pair.run(again) == again.expected
    await pair.whole()


async def stream(pair: Pair, ask: Ask) -> list[int]:
    await pair.decode.router.finished(ask)
    return check_stream([event for node in pair.nodes for event in node.router.events(ask)], 0)


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
async def test_damage_is_found(fault: Fault) -> None:
    async with worker_pair() as pair:
        for harms, ask in asks():
            with pair.faults.on(harms, fault):
                await pair.hand_over(ask)
                reason = await pair.decode.router.failed(ask)
            assert "checksum" in reason or "damaged" in reason or "manifest has" in reason
            await router_retries(pair, ask)
        assert await pair.decode.metric("pdserve_transfer_failures_total") == len(WHICH)
        assert pair.num_links_up == 1


async def test_what_cannot_be_verified_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU without a byte to spare."""
    checksums = HostBlocks.checksums
    async with worker_pair() as pair:

        def of_prefill_only(self: HostBlocks, block_ids: Sequence[int]) -> Iterable[int]:
            if self.whole().ctypes.data == pair.decode.engine.runner.pool.data_ptr():
                raise RuntimeError("out of memory")
            return checksums(self, block_ids)

        ask = Ask("r", prompt_of(40))
        with monkeypatch.context() as patch:
            patch.setattr(HostBlocks, "checksums", of_prefill_only)
            await pair.hand_over(ask)
            await pair.decode.router.failed(ask)
        await router_retries(pair, ask)
        assert pair.num_links_up == 1


async def test_drop_ends_with_the_deadline() -> None:
    """What the sender says it sent does not come: the link is closed, which frees the blocks, and dialled anew."""
    async with worker_pair(limits=shorter(arrival_s=0.1, fence_s=0.1)) as pair:
        for number, (harms, ask) in enumerate(asks()):
            with pair.faults.on(harms, Fault(drop=True)):
                await pair.hand_over(ask)
                assert await pair.decode.router.failed(ask) == "its blocks did not arrive in time"
            await pair.whole()
            await pair.linked_again(2 + number)
            assert pair.decode.engine.pool.visible_keys() == [], "blocks became visible that were not verified"


async def test_retry_after_a_drop() -> None:
    async with worker_pair(limits=shorter(arrival_s=0.5, fence_s=0.1)) as pair:
        ask = Ask("r", prompt_of(40))
        with pair.faults.on(one_block, Fault(drop=True)):
            await pair.hand_over(ask)
            await pair.decode.router.failed(ask)
        await pair.linked_again(2)
        await router_retries(pair, ask)


async def has_sent(pair: Pair, count: int) -> bool:
    return len(pair.faults.seen) == count


async def test_duplicates_change_nothing() -> None:
    async with worker_pair() as pair:
        for harms, ask in asks():
            with pair.faults.on(harms, Fault(duplicate=True)):
                assert await pair.run(ask) == ask.expected
        await pair.whole()
        assert pair.num_links_up == 1


async def test_late_messages_are_waited_for() -> None:
    async with worker_pair() as pair:
        for harms, ask in asks():
            pair.faults.seen.clear()
            with pair.faults.on(harms, Fault(late=True)):
                await pair.hand_over(ask)
                await eventually(lambda: has_sent(pair, 11), "not all is sent")
                await pair.decode.heard()
                assert pair.decode.router.events(ask) == []
            pair.network.release_late()
            assert await stream(pair, ask) == ask.expected
        await pair.whole()


async def test_messages_after_the_link_was_closed_are_dropped() -> None:
    async with worker_pair(limits=shorter(arrival_s=0.5, fence_s=0.1)) as pair:
        for number, (harms, ask) in enumerate(asks()):
            with pair.faults.on(harms, Fault(late=True)):
                await pair.hand_over(ask)
                assert await pair.decode.router.failed(ask) == "its blocks did not arrive in time"
                await pair.linked_again(2 + number)
                await pair.whole()
            other = replace(ask, prompt=prompt_of(40, salt=20), attempt=1)
            pair.decode.gate.close()
            await pair.hand_over(other)
            await pair.decode.gate.reached()
            pair.network.release_late()
            pair.decode.gate.open()
            assert await stream(pair, other) == other.expected
            await pair.whole()


async def test_messages_between_deadline_and_close_are_dropped() -> None:
    """They land in quarantined blocks, which is what these wait for: the link stays."""
    async with worker_pair(limits=shorter(arrival_s=0.5)) as pair:
        for number, (harms, ask) in enumerate(asks()):
            with pair.faults.on(harms, Fault(late=True)):
                await pair.hand_over(ask)
                assert await pair.decode.router.failed(ask) == "its blocks did not arrive in time"
            pair.network.release_late()
            await pair.whole()
            assert await pair.decode.metric("pdserve_late_landings_total") == (1, 11, 12, 23)[number]
            await router_retries(pair, ask)
        assert pair.num_links_up == 1


async def test_manifest_overtakes_the_blocks() -> None:
    async with worker_pair() as pair:
        ask = Ask("r", prompt_of(40))
        with pair.faults.on(blocks, Fault(delay_s=HELD)):
            await pair.hand_over(ask)
            await eventually(lambda: has_sent(pair, 11), "not all is sent")
        pair.prefill.transport.let_go()
        assert await stream(pair, ask) == ask.expected


async def test_prefill_gives_up_when_sends_do_not_end() -> None:
    """The router hears of it from both sides, and the next attempt goes over a new link."""
    async with worker_pair(limits=shorter(handoff_s=0.5, drain_s=0.1, arrival_s=1.0)) as pair:
        ask = Ask("r", prompt_of(40))
        before = len(pair.prefill.router.messages)
        with pair.faults.on(blocks, Fault(delay_s=HELD)):
            await pair.hand_over(ask)
            for node in pair.nodes:
                await node.router.until(lambda node=node: has_error(node, ask))  # type: ignore[misc]
        await pair.whole()
        await pair.prefill.router.link("d", up=False, since=before)
        await pair.prefill.router.link("d", up=True, since=before)
        again = replace(ask, attempt=1)
        assert await pair.run(again) == again.expected


def has_error(node: Node, ask: Ask) -> bool | None:
    return any(event.finish == pb.ERROR for event in node.router.events(ask)) or None


@pytest.mark.parametrize("seed", range(4))
async def test_random_faults_under_load(seed: int) -> None:
    """Each request ends with the undisturbed stream or with an error, and nothing is left behind."""
    kinds = [Fault(drop=True), Fault(corrupt=True), Fault(duplicate=True), Fault(truncate_to_bytes=3), Fault(late=True)]
    async with worker_pair(num_blocks=48, limits=shorter(arrival_s=0.5, fence_s=0.2)) as pair:
        num_tasks = len(asyncio.all_tasks())
        state = seed

        def picks(ordinal: int) -> bool:
            nonlocal state
            state = (state * 1103515245 + 12345) % 2**31
            return state // 65536 % 12 == 0

        for fault in kinds:
            pair.faults.rules.append((picks, fault))
        requests = [Ask(f"r{n}", prompt_of(7 + 5 * (n % 6), salt=n), temperature=1.0) for n in range(18)]
        for start in range(0, len(requests), 6):
            await asyncio.gather(*(end_of(pair, ask) for ask in requests[start : start + 6]))
            pair.network.release_late()
        pair.faults.rules.clear()
        await pair.settled(num_tasks)
        await pair.linked()
        ask = Ask("last", prompt_of(39, salt=40))
        assert await pair.run(ask) == ask.expected


async def end_of(pair: Pair, ask: Ask) -> None:
    """Tokens are a prefix of the undisturbed stream, all of it unless the request failed."""
    pair.prefill.submit(ask)
    await pair.prefill.router.wanted(ask)
    pair.decode.reserve(ask, pair.prefill)
    ticket = await pair.decode.router.reserved_or_refused(ask)
    if ticket.ticket_id:  # else refused: a link that was closed is not back yet
        pair.prefill.hand_off(ask, ticket)
        end = await pair.decode.router.finished(ask)
        events = [event for node in pair.nodes for event in node.router.events(ask) if not event.no_token]
        tokens = [event.token_id for event in sorted(events, key=lambda event: event.index)]
        assert tokens == ask.expected[: len(tokens)]
        assert end.finish == pb.ERROR or tokens == ask.expected
    for node in pair.nodes:
        node.abort(ask)
