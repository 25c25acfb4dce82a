"""Links are made with fitting peers only, follow what routers list, and heal; a closed link lets nothing land."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio
import pytest

from kvstore.transfer.loopback import Fault, LoopbackNetwork, LoopbackTransport
from pdserve.protocol import worker_pb2 as pb
from pdserve.worker.config import LinkLimits, Role
from tests.support.router_client import DEADLINE_S, Ask
from tests.support.tiny_engine import GEOMETRY
from tests.support.worker_pair import (
    HELD,
    LIMITS,
    Faults,
    Node,
    Pair,
    blocks,
    eventually,
    prompt_of,
    running_node,
    shorter,
    worker_pair,
)

ASK = Ask("r", prompt_of(20))


def connect_request(end: bytes, **changes: Any) -> pb.ConnectRequest:
    """What a fitting peer `z` would send."""
    request = pb.ConnectRequest(
        worker_id="z",
        incarnation=1,
        address="127.0.0.1:1",
        fingerprint=GEOMETRY.fingerprint("oracle"),
        block_bytes=GEOMETRY.block_bytes,
        host_id="another host",
        link_address=end,
        transport="loopback",
        pid=1,
    )
    for name, value in changes.items():
        setattr(request, name, value)
    return request


@contextlib.asynccontextmanager
async def raw_link(network: LoopbackNetwork) -> Any:
    transport = LoopbackTransport(network)
    try:
        yield transport.open(lambda completion: None, same_host=True)
    finally:
        transport.close()


async def num_links(network: LoopbackNetwork, count: int) -> None:
    async def as_many() -> bool:
        return len(network.links) == count

    await eventually(as_many, f"{network.links}")


async def test_other_weights_are_refused_in_clear_text() -> None:
    network = LoopbackNetwork()
    async with (
        running_node(network, "p", Role.PREFILL) as prefill,
        running_node(network, "x", Role.DECODE, weights="others") as stranger,
    ):
        prefill.list_peers(stranger)
        report = await prefill.router.link("x", up=False)
        assert "p and x differ in model, dtype or block layout" in report.error
        prefill.submit(ASK)
        await prefill.router.wanted(ASK)
        stranger.reserve(ASK, prefill)
        assert await stranger.router.refused(ASK) == "no link to p"
        prefill.list_peers()
        prefill.abort(ASK)
        await prefill.heard()
        assert sum(message.HasField("link") for message in prefill.router.messages) == 1, "told at every attempt"
        await num_links(network, 0)


UNFIT: list[tuple[dict[str, Any], str]] = [
    ({"transport": "ucx"}, "moves blocks by loopback, the peer by ucx"),
    ({"fingerprint": b""}, "differ in model"),
    ({"block_bytes": 2**63}, "differ in model"),
    ({"link_address": b""}, "nobody is at the peer address"),
    ({"link_address": b"x" * 10000}, "nobody is at the peer address"),
    ({"pid": 0}, "is gone"),
    ({"pid": 2**22 + 1}, "is gone"),
    ({"pid": 2**32 - 1}, "is gone"),
]


async def test_unfit_peers_are_refused_and_leave_nothing() -> None:
    async with worker_pair() as pair, raw_link(pair.network) as link:
        before = len(pair.network.links)
        for changes, says in UNFIT:
            request = connect_request(link.address, **changes)
            if "pid" in changes:
                request.host_id = pair.decode.hello.host_id
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await pair.decode.router.stub.Connect(request, timeout=10)
            assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert says in str(refused.value.details())
            assert len(pair.network.links) == before
        assert await pair.run(ASK) == ASK.expected


async def test_second_connect_closes_the_older_link() -> None:
    async with worker_pair() as pair, raw_link(pair.network) as first, raw_link(pair.network) as second:
        replies = [
            await pair.decode.router.stub.Connect(connect_request(link.address), timeout=10) for link in (first, second)
        ]
        assert replies[0].link_address not in pair.network.links
        assert replies[1].link_address in pair.network.links


async def test_connects_at_once_leave_one_link() -> None:
    async with worker_pair() as pair, contextlib.AsyncExitStack() as stack:
        links = [await stack.enter_async_context(raw_link(pair.network)) for _ in range(5)]
        before = len(pair.network.links)
        stub = pair.decode.router.stub
        calls = [stub.Connect(connect_request(link.address), timeout=10) for link in links]
        await asyncio.gather(*calls)
        await num_links(pair.network, before + 1)


async def test_death_of_the_peers_process_closes_the_link() -> None:
    async with worker_pair() as pair, raw_link(pair.network) as link:
        process = await asyncio.create_subprocess_exec("sleep", "60")
        try:
            request = connect_request(link.address, host_id=pair.decode.hello.host_id, pid=process.pid)
            reply = await pair.decode.router.stub.Connect(request, timeout=10)
            assert reply.link_address in pair.network.links
            before = len(pair.network.links)
        finally:
            process.kill()
        await num_links(pair.network, before - 1)
        assert reply.link_address not in pair.network.links
        await process.wait()


async def test_unlisted_peer_loses_its_link() -> None:
    async with worker_pair(limits=shorter(fence_s=0.2)) as pair:
        with pair.faults.on(blocks, Fault(delay_s=HELD)):
            await pair.hand_over(ASK)
            page = (await pair.prefill.get("/metrics")).text
            assert 'pdserve_link_up{peer="d"} 1.0' in page
            assert 'pdserve_link_bandwidth_bytes_per_second{peer="d",transport="' in page
            pair.prefill.list_peers()
            assert await pair.prefill.router.until(lambda: ended(pair.prefill))
            assert 'peer="d"' not in (await pair.prefill.get("/metrics")).text, "a series of a peer that is gone"
        pair.decode.abort(ASK)
        await pair.whole()
        before = len(pair.prefill.router.messages)
        pair.prefill.list_peers(pair.decode)
        await pair.prefill.router.link("d", up=True, since=before)
        again = replace(ASK, attempt=1)
        assert await pair.run(again) == again.expected


def ended(node: Node) -> bool | None:
    return any(event.finish == pb.ERROR for event in node.router.events(ASK)) or None


async def test_restarted_peer_is_dialled_anew() -> None:
    faults = Faults()
    network = LoopbackNetwork(faults)
    async with running_node(network, "p", Role.PREFILL) as prefill:
        incarnations = set()
        for attempt in range(3):
            async with running_node(network, "d", Role.DECODE) as decode:
                prefill.list_peers(decode)
                report = await prefill.router.link("d", up=True, incarnation=decode.hello.incarnation)
                incarnations.add(report.peer_incarnation)
                pair = Pair([prefill, decode], faults, network)
                ask = replace(ASK, attempt=attempt)
                assert await pair.run(ask) == ask.expected
                await pair.whole()
        assert len(incarnations) == 3
        prefill.list_peers()
        await prefill.heard()
        await num_links(network, 0)


async def test_restarted_peer_under_the_old_listing_is_refused() -> None:
    """A worker that came back at the same address is another one: its blocks are not what we think."""
    network = LoopbackNetwork()
    async with running_node(network, "p", Role.PREFILL) as prefill, running_node(network, "d", Role.DECODE) as decode:
        stale = Node(pb.WorkerHello(), decode.router, decode.gate, decode.transport, decode.engine)
        stale.hello.CopyFrom(decode.hello)
        stale.hello.incarnation += 1
        prefill.list_peers(stale)
        report = await prefill.router.link("d", up=False)
        assert report.error == "d has restarted since it was listed"
        prefill.list_peers(decode)
        await prefill.router.link("d", up=True)


async def test_unreachable_peer_is_reported_and_tried_again() -> None:
    network = LoopbackNetwork()
    async with running_node(network, "p", Role.PREFILL) as prefill:
        nobody = pb.Peer(worker_id="d", incarnation=1, address="127.0.0.1:1")
        prefill.router.send(peers=pb.Peers(peers=[nobody]))
        report = await prefill.router.link("d", up=False)
        assert "onnect" in report.error
        async with running_node(network, "d", Role.DECODE) as decode:
            prefill.list_peers(decode)
            await prefill.router.link("d", up=True)
        prefill.list_peers()
        await num_links(network, 0)


async def test_frozen_peer_cannot_keep_our_blocks() -> None:
    """Prefill does not answer the fence: decode closes the link, and has its blocks back while the writer holds on."""
    frozen = replace(LIMITS, link=replace(LIMITS.link, check_s=DEADLINE_S))
    async with worker_pair(limits=shorter(fence_s=0.1), prefill_options={"limits": frozen}) as pair:
        with pair.faults.on(blocks, Fault(delay_s=HELD)):
            await pair.hand_over(ASK)

            async def sent() -> bool:
                return len(pair.faults.seen) == 6

            await eventually(sent, "not all is sent")
        pair.decode.abort(ASK)

        async def idle() -> bool:
            return bool((await pair.decode.ledger())["idle"])

        await eventually(idle, "decode waits for a frozen peer")
        assert (await pair.prefill.ledger())["by_state"]["sending"] == 5
        other = Ask("other", prompt_of(100, salt=4), max_tokens=4)
        pair.decode.submit(other, disaggregated=False)
        pair.prefill.transport.let_go()
        await pair.decode.router.finished(other)
        assert [event.token_id for event in pair.decode.router.events(other)] == other.expected
        await pair.whole()


async def test_link_that_decode_closed_heals() -> None:
    """Prefill has nothing under way on it, so no failed operation tells it."""
    limits = replace(shorter(fence_s=0.1), link=LinkLimits(check_s=0.05, probe_bytes=1024, backoff_s=(0.01,)))
    async with worker_pair(limits=limits) as pair:
        before = len(pair.prefill.router.messages)
        pair.prefill.gate.close()
        long = Ask("long", prompt_of(40))
        pair.prefill.submit(long)
        for _ in range(2):
            pair.prefill.gate.pass_step()
        await pair.prefill.router.wanted(long)
        await pair.prefill.gate.reached()
        pair.decode.reserve(long, pair.prefill)
        with pair.faults.on(blocks, Fault(drop=True)):
            pair.prefill.hand_off(long, await pair.decode.router.reserved(long))

            async def sent() -> bool:
                return len(pair.faults.seen) == 8

            await eventually(sent, "nothing was sent")
        pair.decode.abort(long)
        await pair.prefill.router.failed(long)
        pair.prefill.gate.open()
        await pair.prefill.router.link("d", up=False, since=before)
        await pair.prefill.router.link("d", up=True, since=before)
        await pair.whole()
        assert await pair.run(ASK) == ASK.expected


async def test_check_of_a_link_leaves_it_as_it_is() -> None:
    limits = shorter()
    limits = replace(limits, link=replace(limits.link, check_s=0.01))
    async with worker_pair(limits=limits) as pair:
        before = len(pair.network.links)
        for attempt in range(5):
            ask = replace(ASK, attempt=attempt)
            assert await pair.run(ask) == ask.expected
        assert len(pair.network.links) == before
        assert pair.num_links_up == 1
