"""A client that goes away, in whichever phase, leaves both pools whole within 2 s, and nobody else notices."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests.support.api_client import Answer
from tests.support.passages import Encode, passage_tokens
from tests.support.stack import Stack, WorkerProcess, wait_for

pytestmark = pytest.mark.e2e

REACHED_S = 20.0  # until a phase is reached, on a busy machine
WHOLE_S = 2.0


@pytest.fixture(scope="module")
def before(disaggregated: Stack, encode: Encode) -> Answer:
    return disaggregated.client.complete(passage_tokens(encode, 400, 40))


@pytest.fixture
def stack(disaggregated: Stack, encode: Encode, before: Answer) -> Iterator[Stack]:
    """What is asked afterwards is answered as before."""
    yield disaggregated
    disaggregated.assert_pools_whole(WHOLE_S)
    after = disaggregated.client.complete(passage_tokens(encode, 400, 40))
    assert (after.text, after.finish_reason) == (before.text, before.finish_reason)


@pytest.fixture
def prefill(stack: Stack) -> WorkerProcess:
    return stack.workers["prefill-0"]


@pytest.fixture
def decode(stack: Stack) -> WorkerProcess:
    return stack.workers["decode-0"]


def until_blocks(worker: WorkerProcess, state: str) -> None:
    wait_for(lambda: worker.blocks(state) > 0, REACHED_S, lambda: f"{worker.ledger()}")


def test_queued(stack: Stack, encode: Encode) -> None:
    """Nearly all of them in the router: a worker gets no more than keeps it busy."""
    with contextlib.ExitStack() as clients:
        for n in range(30):
            clients.enter_context(stack.client.send({"prompt": passage_tokens(encode, 410 + n, 300)}))
        wait_for(lambda: stack.queued() >= 20, REACHED_S, lambda: "the requests are not queued")
    stack.assert_pools_whole(WHOLE_S)
    wait_for(lambda: stack.queued() == 0, WHOLE_S, lambda: "some still wait")


def test_prefilling(stack: Stack, prefill: WorkerProcess, encode: Encode) -> None:
    computed_before = prefill.metric("pdserve_computed_tokens_total")
    with stack.client.send({"prompt": passage_tokens(encode, 450, 2500)}):
        until_blocks(prefill, "held")
    stack.assert_pools_whole(WHOLE_S)
    assert prefill.metric("pdserve_computed_tokens_total") - computed_before < 2500, "it was over before the disconnect"


@pytest.mark.parametrize("stream", [False, True])
def test_handing_over(stack: Stack, decode: WorkerProcess, encode: Encode, stream: bool) -> None:
    """Decode has promised room, and blocks are landing in it."""
    with stack.client.send({"prompt": passage_tokens(encode, 460 + stream, 1000), "stream": stream}):
        until_blocks(decode, "receiving")


@pytest.mark.parametrize("tokens", [1, 2, 20])
def test_streaming(stack: Stack, encode: Encode, tokens: int) -> None:
    with stack.client.stream({"prompt": passage_tokens(encode, 470 + tokens, 200), "max_tokens": 500}) as stream:
        stream.read(tokens)
    stack.assert_pools_whole(WHOLE_S)


def test_decoding_without_a_stream(stack: Stack, decode: WorkerProcess, encode: Encode) -> None:
    with stack.client.send({"prompt": passage_tokens(encode, 480, 200), "max_tokens": 500}):
        until_blocks(decode, "held")


def test_others_in_the_batch_do_not_notice(stack: Stack, encode: Encode) -> None:
    prompt = passage_tokens(encode, 490, 100)
    undisturbed = stack.client.complete(prompt, max_tokens=40)
    with stack.client.stream({"prompt": prompt, "max_tokens": 40}) as stays:
        for n in range(6):
            with stack.client.stream({"prompt": passage_tokens(encode, 491 + n, 60), "max_tokens": 500}) as leaves:
                leaves.read(2)
        answer: Answer = stays.finish()
    assert answer.text == undisturbed.text
