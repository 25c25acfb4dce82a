"""Whatever dies or freezes, in whichever phase: the answer is the undisturbed one, and soon, and pools are whole.

`wide` has a second worker of each role; in `pair` the survivor does the whole request.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from tests.e2e.conftest import MakeStack
from tests.support.api_client import Answer, ApiClient, ApiError
from tests.support.passages import Encode, passage_tokens
from tests.support.stack import Stack, WorkerProcess, wait_for

pytestmark = pytest.mark.e2e

# For the first token, and for every gap: noticing that a worker is frozen takes 5 s, and computing the longest prompt
# anew 3 s, or several times as long on a machine that does other things too.
BOUND_S = 30.0
DEATH_S = 10.0
FREEZE_S = 12.0
OPTIONS = ("--max-batched-tokens", "256")  # a prompt of 1,000 tokens is in each of its phases for a while

Ask = Callable[[dict[str, Any]], Future[str]]

in_both = pytest.mark.parametrize("stack", ["wide", "pair"], indirect=True)
in_wide = pytest.mark.parametrize("stack", ["wide"], indirect=True)
in_pair = pytest.mark.parametrize("stack", ["pair"], indirect=True)


@pytest.fixture(scope="module")
def wide(make_stack: MakeStack) -> Iterator[Stack]:
    with make_stack(*OPTIONS, prefill=2, decode=2) as stack:
        yield stack


@pytest.fixture(scope="module")
def pair(make_stack: MakeStack) -> Iterator[Stack]:
    with make_stack(*OPTIONS, prefill=1, decode=1) as stack:
        yield stack


@pytest.fixture(scope="module")
def undisturbed(mixed: Stack) -> Iterator[Ask]:
    """The text of a request that nothing happens to, on a worker that nothing happens to, beside the request to which
    something does."""
    known: dict[str, Future[str]] = {}
    with ThreadPoolExecutor() as executor:

        def text(body: dict[str, Any]) -> Future[str]:
            key = json.dumps(body)
            if key not in known:
                known[key] = executor.submit(lambda: mixed.client.ask(body).text)
            return known[key]

        yield text


@pytest.fixture
def stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    """Complete at the start of each test, which also shows that workers that come back are taken in again."""
    stack: Stack = request.getfixturevalue(request.param)
    stack.revive()
    yield stack
    stack.assert_pools_whole()


@pytest.fixture
def client(stack: Stack) -> ApiClient:
    return ApiClient(stack.port, stack.model.name, timeout_s=BOUND_S)


class Background:
    """Requests whose first token is still to come."""

    def __init__(self, client: ApiClient, bodies: Sequence[dict[str, Any]]) -> None:
        self._executor = ThreadPoolExecutor(len(bodies))
        self._answers: list[Future[Answer]] = [
            self._executor.submit(lambda body: client.stream(body).finish(), body) for body in bodies
        ]

    def texts(self) -> list[str]:
        with self._executor:
            return [answer.result().text for answer in self._answers]


def busy(stack: Stack, role: str, state: str) -> WorkerProcess:
    """The worker of this role that comes to have blocks in this state; nothing else is being asked."""
    found: list[WorkerProcess] = []

    def look() -> bool:
        found[:] = [worker for worker in stack.with_role(role) if worker.blocks(state)]
        return bool(found)

    wait_for(look, BOUND_S, lambda: f"no {role} worker has {state} blocks")
    return found[0]


# --- prefill dies ----------------------------------------------------------------------------------------------------


@in_both
def test_prefill_killed_with_requests_queued(stack: Stack, client: ApiClient, undisturbed: Ask, encode: Encode) -> None:
    # Three for each prefill worker: it computes one, and at least one of the others waits in the router.
    bodies = [{"prompt": passage_tokens(encode, 500 + n, 500)} for n in range(3 * len(stack.with_role("prefill")))]
    expected = [undisturbed(body) for body in bodies]
    # The last of them waits until the worker that is left has computed all the others.
    requests = Background(replace(client, timeout_s=len(bodies) * BOUND_S), bodies)
    wait_for(lambda: stack.queued() > 0, BOUND_S, lambda: "nothing is queued")
    stack.with_role("prefill")[0].kill()
    assert requests.texts() == [each.result() for each in expected]


@in_both
def test_prefill_killed_while_prefilling(stack: Stack, client: ApiClient, undisturbed: Ask, encode: Encode) -> None:
    body = {"prompt": passage_tokens(encode, 510, 1000)}
    expected = undisturbed(body)
    asked = Background(client, [body])
    busy(stack, "prefill", "held").kill()
    assert asked.texts() == [expected.result()]
    assert stack.events("redispatches") > 0


@in_both
def test_prefill_killed_while_handing_over(stack: Stack, client: ApiClient, undisturbed: Ask, encode: Encode) -> None:
    body = {"prompt": passage_tokens(encode, 520, 1024)}
    expected = undisturbed(body)
    asked = Background(client, [body])
    prefill = busy(stack, "prefill", "held")
    busy(stack, "decode", "receiving")
    prefill.kill()
    assert asked.texts() == [expected.result()]


@in_both
def test_prefill_killed_while_decoding(stack: Stack, client: ApiClient, undisturbed: Ask, encode: Encode) -> None:
    """Its part is over: nothing happens."""
    body = {"prompt": passage_tokens(encode, 530, 100), "max_tokens": 40}
    expected = undisturbed(body)
    migrations = stack.events("migrations")
    with client.stream(body) as stream:
        stream.read(5)
        for worker in stack.with_role("prefill"):
            worker.kill()
        assert stream.finish().text == expected.result()
    assert stack.events("migrations") == migrations
    # Decode serves alone until prefill is back.
    assert client.ask(body).text == expected.result()


# --- decode dies -----------------------------------------------------------------------------------------------------


@in_both
def test_decode_killed_while_handing_over(stack: Stack, client: ApiClient, undisturbed: Ask, encode: Encode) -> None:
    body = {"prompt": passage_tokens(encode, 540, 1024)}
    expected = undisturbed(body)
    asked = Background(client, [body])
    busy(stack, "decode", "receiving").kill()
    assert asked.texts() == [expected.result()]


@in_both
def test_decode_killed_while_streaming(stack: Stack, client: ApiClient, undisturbed: Ask, encode: Encode) -> None:
    body = {"prompt": passage_tokens(encode, 550, 300), "max_tokens": 60}
    expected = undisturbed(body)
    with client.stream(body) as stream:
        stream.read(10)
        stack.holder(stream.request_id, "decode").kill()
        assert stream.finish().text == expected.result()
    assert stream.longest_gap_s < DEATH_S
    assert stack.events("migrations") > 0


NUMBERS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 20, "maxItems": 20}
MOVED: dict[str, dict[str, Any]] = {
    "sampled": {},
    "penalised": {"frequency_penalty": 0.8, "presence_penalty": 0.4, "repetition_penalty": 1.2, "min_p": 0.02},
    "structured": {"guided_json": NUMBERS, "max_tokens": 120},
    "told": {"logprobs": 3, "echo": True},
}


@in_wide
@pytest.mark.parametrize("parameters", MOVED.values(), ids=MOVED)
def test_decode_killed_under_seeded_sampling(
    stack: Stack, client: ApiClient, undisturbed: Ask, encode: Encode, parameters: dict[str, Any]
) -> None:
    """What depends on the tokens before goes on with them: penalties, and the state of a grammar."""
    prompt = passage_tokens(encode, 555, 60)
    body = {"prompt": prompt, "max_tokens": 60, "temperature": 0.9, "seed": 11, **parameters}
    expected = undisturbed(body)
    with client.stream(body) as stream:
        stream.read(10)
        stack.holder(stream.request_id, "decode").kill()
        assert stream.finish().text == expected.result()
    if "guided_json" in parameters:
        assert len(json.loads(expected.result())) == 20


@in_wide
def test_stop_string_across_the_death_of_decode(
    stack: Stack, client: ApiClient, undisturbed: Ask, encode: Encode
) -> None:
    """Its first half came from the worker that died."""
    body = {"prompt": passage_tokens(encode, 556, 60), "max_tokens": 60, "temperature": 0.9, "seed": 12}
    whole = undisturbed(body).result()
    stop = whole[20:120]  # longer than what is read before the death
    with client.stream(body | {"stop": [stop]}) as stream:
        stream.read(2)
        stack.holder(stream.request_id, "decode").kill()
        assert stream.finish().text == whole[:20]


@in_wide
def test_both_workers_of_a_request_killed(stack: Stack, client: ApiClient, undisturbed: Ask, encode: Encode) -> None:
    body = {"prompt": passage_tokens(encode, 560, 1024), "max_tokens": 40}
    expected = undisturbed(body)
    asked = Background(client, [body])
    prefill = busy(stack, "prefill", "held")
    decode = busy(stack, "decode", "receiving")
    prefill.kill()
    decode.kill()
    assert asked.texts() == [expected.result()]


# --- freezing --------------------------------------------------------------------------------------------------------


@in_wide
def test_decode_frozen_while_streaming(stack: Stack, client: ApiClient, undisturbed: Ask, encode: Encode) -> None:
    """What the zombie still has to say when it wakes up, in the middle of the answer, is not in the answer."""
    body = {"prompt": passage_tokens(encode, 570, 200), "max_tokens": 100, "ignore_eos": True}
    expected = undisturbed(body)
    with client.stream(body) as stream:
        stream.read(10)
        decode = stack.holder(stream.request_id, "decode")
        decode.freeze()
        try:
            # More than what was on its way when it froze.
            while stream.longest_gap_s < 2.0:
                stream.read(1)
        finally:
            decode.thaw()
        assert stream.finish().text == expected.result()
    assert stream.longest_gap_s < FREEZE_S
    stack.assert_pools_whole()


@in_wide
def test_prefill_frozen_while_handing_over(stack: Stack, client: ApiClient, undisturbed: Ask, encode: Encode) -> None:
    """Its late writes land in nobody's blocks."""
    body = {"prompt": passage_tokens(encode, 580, 1024), "max_tokens": 40}
    expected = undisturbed(body)
    asked = Background(client, [body])
    prefill = busy(stack, "prefill", "held")
    busy(stack, "decode", "receiving")
    prefill.freeze()
    try:
        assert asked.texts() == [expected.result()]
    finally:
        prefill.thaw()
    stack.assert_pools_whole()
    assert client.ask(body).text == expected.result()


# --- the router dies -------------------------------------------------------------------------------------------------


@in_pair
def test_router_killed_while_streaming(stack: Stack, client: ApiClient, undisturbed: Ask, encode: Encode) -> None:
    """The client sees a broken connection, never a false end; the workers take back what the request had."""
    body = {"prompt": passage_tokens(encode, 590, 200), "max_tokens": 500, "ignore_eos": True}
    assert stack.router is not None
    with client.stream(body) as stream:
        stream.read(5)
        stack.router.kill()
        stack.router.wait()
        with pytest.raises((ApiError, http.client.HTTPException, ConnectionError)):
            stream.finish()
    assert stream.finish_reason is None
    stack.assert_pools_whole(5.0)
    stack.start_router()
    again = {**body, "max_tokens": 16}
    assert client.ask(again).text == undisturbed(again).result()


@in_pair
def test_router_killed_while_prefilling(stack: Stack, client: ApiClient, encode: Encode) -> None:
    assert stack.router is not None
    with client.send({"prompt": passage_tokens(encode, 591, 1500)}):
        busy(stack, "prefill", "held")
        stack.router.kill()
        stack.router.wait()
        stack.assert_pools_whole(5.0)
