"""Health is progress: a step that hangs leaves pings unanswered and `/readyz` unready; deadlines go on all the same."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import replace

import grpc
import grpc.aio
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvstore.transfer.loopback import LoopbackNetwork
from pdserve.protocol import PROTOCOL_VERSION
from pdserve.protocol import worker_pb2 as pb
from pdserve.worker.config import Role
from tests.support.router_client import Ask, RouterClient
from tests.support.worker_pair import Node, eventually, prompt_of, running_node, shorter, worker_pair

ASK = Ask("r", prompt_of(20))


async def answers(node: Node, path: str, status: int) -> None:
    async def does() -> bool:
        return (await node.get(path)).status_code == status

    await eventually(does, f"{path} does not answer {status}")


async def test_step_that_hangs_is_not_healthy() -> None:
    async with running_node(LoopbackNetwork(), "w", Role.MIXED, limits=shorter(stalled_s=0.1)) as node:
        assert (await node.get("/readyz")).json() == {"status": "ok"}
        node.gate.close()
        node.submit(ASK, disaggregated=False)
        await node.gate.reached()
        await answers(node, "/readyz", 503)
        assert (await node.get("/livez")).status_code == 200
        node.router.send(ping=pb.Ping(sequence=1000))
        expiring = Ask("expiring", prompt_of(3), remaining_s=0.05)
        node.submit(expiring, disaggregated=False)
        assert await node.router.failed(expiring) == "the request's deadline has passed"
        node.gate.open()
        await answers(node, "/readyz", 200)
        await node.heard()
        await node.router.finished(ASK)
        assert 1000 not in [message.pong.sequence for message in node.router.messages]
        assert [event.token_id for event in node.router.events(ASK)] == ASK.expected


async def test_ledger_is_told_as_json() -> None:
    async with worker_pair() as pair:
        pair.prefill.submit(ASK)
        await pair.prefill.router.event(ASK)
        ledger = await pair.prefill.ledger()
        (hold,) = ledger.pop("holds")
        assert ledger == {
            "worker_id": "p",
            "total_blocks": 32,
            "by_state": {"free": 27, "cached": 0, "held": 0, "sending": 5, "receiving": 0, "quarantined": 0},
            "sums": True,
            "idle": False,
        }
        assert (hold["owner"], hold["kind"], hold["num_blocks"]) == ("r#0", "send", 5)
        assert 0 < hold["expires_in_s"] <= 30
        pair.decode.reserve(ASK, pair.prefill)
        await pair.decode.router.reserved(ASK)
        ledger = await pair.decode.ledger()
        assert ledger["by_state"]["receiving"] == 5
        assert [hold["kind"] for hold in ledger["holds"]] == ["receive"]
        for node in pair.nodes:
            node.abort(ASK)
        await pair.whole()


async def test_metrics_parse_and_count() -> None:
    async with worker_pair() as pair:
        assert await pair.run(ASK) == ASK.expected
        await pair.whole()
        block_bytes = pair.decode.hello.block_bytes
        for node, computed, direction in ((pair.prefill, 20, "sent"), (pair.decode, 5, "received")):
            text = (await node.get("/metrics")).text
            samples = {
                (sample.name, *sample.labels.values()): sample.value
                for family in text_string_to_metric_families(text)
                for sample in family.samples
            }
            assert samples["pdserve_computed_tokens_total",] == computed
            assert samples["pdserve_transfer_bytes_total", direction] == 5 * block_bytes
            assert ("pdserve_build_info", "worker", node.hello.admin_address, "") not in samples

        async def gauges_are_fresh() -> bool:
            return await pair.decode.metric("pdserve_kv_blocks") == 32

        await eventually(gauges_are_fresh, "the gauges do not sum to the pool")


async def refused(address: str, messages: Iterable[pb.RouterMessage]) -> grpc.StatusCode:
    client = RouterClient(address)
    call = client.stub.Session(iter(messages))
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call.read()
    await client._channel.close(None)
    return error.value.code()


async def test_session_begins_with_a_fitting_hello() -> None:
    async with running_node(LoopbackNetwork(), "w", Role.MIXED) as node:
        hello = pb.RouterMessage(hello=pb.RouterHello(protocol_version=PROTOCOL_VERSION + 1))
        assert await refused(node.hello.address, [hello]) is grpc.StatusCode.FAILED_PRECONDITION
        for first in ([], [pb.RouterMessage()], [pb.RouterMessage(submit=ASK.submit())]):
            assert await refused(node.hello.address, first) is grpc.StatusCode.INVALID_ARGUMENT
        await node.heard()


async def test_routers_share_a_worker_and_hear_only_of_their_own() -> None:
    async with running_node(LoopbackNetwork(), "w", Role.MIXED) as node:
        other = replace(node, router=RouterClient(node.hello.address))
        await other.router.open()
        asks = [Ask(f"r{n}", prompt_of(5 + n, salt=n)) for n in range(6)]
        nodes = [node, other] * 3
        for each, ask in zip(nodes, asks, strict=True):
            each.submit(ask, disaggregated=False)
        await asyncio.gather(*(each.router.finished(ask) for each, ask in zip(nodes, asks, strict=True)))
        for number, (each, ask) in enumerate(zip(nodes, asks, strict=True)):
            assert [event.token_id for event in each.router.events(ask)] == ask.expected
            assert nodes[number - 1].router.events(ask) == []
        await other.router.close()
        await node.heard()


async def test_load_is_reported_when_the_worker_falls_idle() -> None:
    async with running_node(LoopbackNetwork(), "w", Role.MIXED) as node:
        node.gate.close()
        node.submit(ASK, disaggregated=False)
        node.submit(replace(ASK, request_id="waiting"), disaggregated=False)
        await node.gate.reached()
        node.gate.open()
        await node.router.finished(ASK)
        end = await node.router.wait(lambda message: message.load if is_idle(message.load) else None)
        assert (end.free_blocks, end.total_blocks) == (32, 32)


def is_idle(load: pb.LoadReport) -> bool:
    return load.step_s > 0 and not load.running_sequences and not load.waiting_sequences
