"""What cannot be run is answered with an error and holds nothing; a step that raises ends its own requests only."""

from __future__ import annotations

import asyncio
import math
import signal
from dataclasses import replace
from typing import Any

from kvstore.transfer.loopback import Fault, LoopbackNetwork
from pdserve.errors import InvalidRequest
from pdserve.protocol import codec
from pdserve.protocol import worker_pb2 as pb
from pdserve.worker.config import Role
from tests.support.oracle_model import VOCAB_SIZE
from tests.support.router_client import DEADLINE_S, Ask
from tests.support.worker_pair import (
    HELD,
    LIMITS,
    Pair,
    blocks,
    check_stream,
    eventually,
    prompt_of,
    running_node,
    worker_pair,
)

GOOD = Ask("r", prompt_of(10), max_tokens=40)


def with_sampling(**changes: Any) -> pb.Submit:
    submit = GOOD.submit()
    for name, value in changes.items():
        if isinstance(value, list):
            getattr(submit.sampling, name).extend(value)
        else:
            setattr(submit.sampling, name, value)
    return submit


def with_tokens(prompt: int = 10, output: tuple[int, ...] = ()) -> pb.Submit:
    submit = replace(GOOD, prompt=(1,) * prompt).submit()
    submit.output_token_ids.extend(output)
    return submit


BAD = [
    with_tokens(0),
    with_tokens(32 * 4),
    with_tokens(100, output=(1,) * 28),
    with_tokens(10, output=(VOCAB_SIZE,)),
    with_tokens(10, output=(1,) * 40),
    replace(GOOD, prompt=(1, VOCAB_SIZE)).submit(),
    replace(GOOD, prompt=(2**32 - 1,)).submit(),
    replace(GOOD, root_key=b"short").submit(),
    replace(GOOD, root_key=b"").submit(),
    *(replace(GOOD, remaining_s=value).submit() for value in (0.0, -1.0, math.nan, math.inf)),
    with_sampling(max_tokens=0),
    with_sampling(seed=2**63),
    *(with_sampling(temperature=value) for value in (-0.5, math.nan, math.inf)),
    *(with_sampling(top_p=value) for value in (0.0, -1.0, 1.5, math.nan)),
    with_sampling(stop_token_ids=[VOCAB_SIZE]),
    with_sampling(stop_token_ids=list(range(VOCAB_SIZE))),
    pb.Submit(),
]


async def test_bad_requests_are_errors_and_hold_nothing() -> None:
    async with worker_pair() as pair:
        for number, submit in enumerate(BAD):
            submit = codec_copy(submit)
            submit.request_id = f"bad{number}"
            ask = Ask(submit.request_id, ())
            pair.prefill.router.send(submit=submit)
            assert await pair.prefill.router.failed(ask)
            pair.decode.router.send(
                reserve=pb.Reserve(
                    request=submit, prefill_worker_id="p", prefill_incarnation=pair.prefill.hello.incarnation
                )
            )
            assert await pair.decode.router.failed(ask)
        await pair.whole()
        assert await pair.run(GOOD) == GOOD.expected


def codec_copy(submit: pb.Submit) -> pb.Submit:
    return pb.Submit.FromString(submit.SerializeToString())


async def test_empty_and_unknown_messages_are_ignored() -> None:
    async with worker_pair() as pair:
        for node in pair.nodes:
            node.router.send()
            node.router.send(hello=pb.RouterHello(protocol_version=1, router_id="again"))
            node.router.send(handoff=pb.Handoff())
            node.router.send(abort=pb.Abort(request_id="nobody", attempt=7))
            await node.heard()
        assert await pair.run(GOOD) == GOOD.expected


async def test_broken_step_ends_its_requests_only() -> None:
    async with running_node(LoopbackNetwork(), "w", Role.MIXED) as node:
        first, second = Ask("first", prompt_of(12)), Ask("second", prompt_of(12, salt=1))
        node.gate.close()
        node.submit(first, disaggregated=False)
        await node.gate.reached()
        node.submit(second, disaggregated=False)
        await node.heard()
        node.gate.break_steps(1)
        node.gate.open()
        assert await node.router.failed(first) == "the worker failed to compute this request"
        await node.router.finished(second)
        assert check_stream(node.router.events(second), 0) == second.expected
        pair = Pair([node], faults=None, network=None)  # type: ignore[arg-type]
        await pair.whole()
        assert await node.metric("pdserve_failed_steps_total") == 1


async def test_broken_step_while_earlier_blocks_travel() -> None:
    """The blocks are given back when nothing reads them any more, not when the step has failed."""
    async with worker_pair() as pair:
        ask = Ask("r", prompt_of(40))
        pair.prefill.gate.close()
        pair.prefill.submit(ask)
        for _ in range(2):
            pair.prefill.gate.pass_step()
        await pair.prefill.router.wanted(ask)
        await pair.prefill.gate.reached()
        pair.decode.reserve(ask, pair.prefill)
        with pair.faults.on(blocks, Fault(delay_s=HELD)):
            pair.prefill.hand_off(ask, await pair.decode.router.reserved(ask))

            async def sent() -> bool:
                return len(pair.faults.seen) == 8

            await eventually(sent, "nothing was sent")
        pair.prefill.gate.break_steps(1)
        pair.prefill.gate.open()
        await pair.prefill.router.failed(ask)
        assert (await pair.prefill.ledger())["by_state"]["sending"] == 10
        pair.prefill.transport.let_go()
        pair.decode.abort(ask)
        await pair.whole()
        again = replace(ask, attempt=1)
        assert await pair.run(again) == again.expected


async def test_decode_step_breaks() -> None:
    async with worker_pair() as pair:
        pair.decode.gate.break_steps(1)
        await pair.hand_over(GOOD)
        assert await pair.decode.router.failed(GOOD) == "the worker failed to compute this request"
        await pair.whole()
        again = replace(GOOD, attempt=1)
        assert await pair.run(again) == again.expected


async def test_engine_ends_after_three_broken_steps_in_a_row() -> None:
    """And the process is told to end, for routers to move on."""
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, told.set)
    try:
        async with running_node(LoopbackNetwork(), "w", Role.MIXED) as node:
            node.gate.break_steps(2)
            for number in range(2):
                await broken(node.router, number, node)
            fine = Ask("fine", prompt_of(5))
            node.submit(fine, disaggregated=False)
            await node.router.finished(fine)
            node.gate.break_steps(3)
            for number in range(2, 4):
                await broken(node.router, number, node)
            node.submit(Ask("last", prompt_of(5)), disaggregated=False)
            async with asyncio.timeout(DEADLINE_S):
                await told.wait()
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


async def broken(router: Any, number: int, node: Any) -> None:
    ask = Ask(f"broken{number}", prompt_of(5, salt=number))
    node.submit(ask, disaggregated=False)
    await router.failed(ask)


async def test_same_attempt_again_while_the_first_still_drains() -> None:
    """A router does not do that; it must not bring the worker down."""
    async with worker_pair() as pair:
        ask = Ask("r", prompt_of(40))
        with pair.faults.on(blocks, Fault(delay_s=HELD)):
            await pair.hand_over(ask)

            async def sent() -> bool:
                return len(pair.faults.seen) == 11

            await eventually(sent, "not all is sent")
        pair.prefill.abort(ask)
        pair.prefill.submit(ask)
        await pair.prefill.heard()
        pair.prefill.transport.let_go()
        pair.decode.abort(ask)
        await pair.whole()
        for node in pair.nodes:
            await node.router.close()
            await node.rejoin()
        pair.prefill.list_peers(pair.decode)
        await pair.prefill.router.link("d", up=True)
        assert await pair.run(ask) == ask.expected


async def test_deadline_of_the_request_in_every_phase() -> None:
    async with worker_pair() as pair:
        for node in pair.nodes:
            node.gate.close()
            ask = Ask(f"on {node.hello.worker_id}", prompt_of(20), remaining_s=0.1)
            node.submit(ask, disaggregated=False)
            assert await node.router.failed(ask) == "the request's deadline has passed"
            node.gate.open()
        waiting = Ask("waiting for a ticket", prompt_of(20), remaining_s=0.2)
        pair.prefill.submit(waiting)
        assert await pair.prefill.router.failed(waiting) == "the request's deadline has passed"
        await pair.whole()


async def test_prompt_whose_blocks_nobody_takes() -> None:
    limits = replace(LIMITS, handoff_s=0.1)
    async with worker_pair(limits=limits) as pair:
        pair.prefill.submit(GOOD)
        assert await pair.prefill.router.failed(GOOD) == "its blocks were not pushed in time"
        await pair.whole()


def test_every_check_of_submit_is_covered() -> None:
    """The table above fails each check of the codec at least once."""
    errors = set()
    for submit in BAD:
        try:
            codec.check_submit(submit, vocab_size=VOCAB_SIZE, max_model_len=32 * 4)
            codec.sampling_from_proto(submit.sampling, VOCAB_SIZE)
        except InvalidRequest as error:
            errors.add(error.param)
        else:
            raise AssertionError(f"{submit} is fine")
    assert errors == {
        *("prompt", "output_token_ids", "root_key", "remaining_s", "seed"),
        *("temperature", "top_p", "stop_token_ids"),
    }
