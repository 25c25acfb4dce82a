"""Each router hears at once what the others sent, whatever step is in progress, and of its own nothing."""

from __future__ import annotations

from dataclasses import replace

from kvstore.transfer.loopback import LoopbackNetwork
from pdserve.protocol import worker_pb2 as pb
from pdserve.worker.config import Role
from tests.support.router_client import Ask, RouterClient
from tests.support.worker_pair import Node, prompt_of, running_node

ASK = Ask("r", prompt_of(20))


def others(load: pb.LoadReport) -> tuple[int, int, int]:
    return load.others_sent_tokens, load.others_waiting_tokens, load.others_sequences


async def told(node: Node, wanted: tuple[int, int, int]) -> None:
    await node.router.wait(
        lambda message: message.load if message.HasField("load") and others(message.load) == wanted else None
    )


def send(node: Node, ask: Ask, uncached_tokens: int) -> None:
    submit = ask.submit(disaggregated=False)
    submit.uncached_tokens = uncached_tokens
    node.router.send(submit=submit)


async def test_a_prompt_of_one_router_is_told_to_the_other_while_a_step_hangs() -> None:
    async with running_node(LoopbackNetwork(), "w", Role.MIXED) as node:
        other = replace(node, router=RouterClient(node.hello.address))
        await other.router.open()
        node.gate.close()
        send(node, ASK, 20)
        await node.gate.reached()
        await told(other, (20, 20, 1))
        send(other, replace(ASK, request_id="mine"), 15)
        send(other, replace(ASK, request_id="mine too"), 0)
        await told(node, (15, 15, 2))
        late = replace(node, router=RouterClient(node.hello.address))
        await late.router.open()  # what came before it is in no count of its
        send(other, replace(ASK, request_id="another"), 1)
        await told(late, (1, 36, 4))
        send(other, replace(ASK, request_id="another", prompt=()), 7)  # cannot be run: nobody's load
        node.gate.open()
        await node.router.finished(ASK)
        for each in (node, other, late):
            first = next(message.load for message in each.router.messages if message.HasField("load"))
            assert others(first) == (0, 0, 0)
        await told(node, (16, 0, 0))
        await told(other, (20, 0, 0))
        await told(late, (1, 0, 0))
        await other.router.close()
        await late.router.close()


async def test_a_single_router_hears_of_nobody() -> None:
    async with running_node(LoopbackNetwork(), "w", Role.MIXED) as node:
        send(node, ASK, 20)
        await node.router.finished(ASK)
        await node.heard()
        assert {others(message.load) for message in node.router.messages if message.HasField("load")} == {(0, 0, 0)}
