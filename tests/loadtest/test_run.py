"""An open loop waits for no answer, a closed one for each; whatever fails is an outcome. Against a socket server."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from loadtest.client import ask, ask_blocking
from loadtest.run import run_closed, run_open
from loadtest.session import Session, Turn
from loadtest.target import Target

HEAD = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
ANSWER = HEAD + b'data: {"choices": [{"text": "word"}]}\n\ndata: [DONE]\n\n'
CHAT_ANSWER = HEAD + b'data: {"choices": [{"delta": {"content": "word"}}]}\n\ndata: [DONE]\n\n'
ONE = (Turn((1, 2, 3), 1),)

Answer = Callable[[dict[str, object]], Awaitable[bytes]]


@contextlib.asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[Target]:
    """Reads a request, and sends what `answer` makes of its body."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError):
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].split()[0])
            writer.write(await answer(json.loads(await reader.readexactly(length))))
            await writer.drain()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with server:
        yield Target("127.0.0.1", server.sockets[0].getsockname()[1], "m")


async def test_an_open_loop_sends_whatever_the_server_does() -> None:
    all_there = asyncio.Barrier(20)

    async def answer(body: dict[str, object]) -> bytes:
        await all_there.wait()  # nobody is answered before all have asked
        return ANSWER

    async with serving(answer) as target:
        run = await run_open(target, (Session(0.001 * number, ONE) for number in range(20)), 1.0, 30.0)
    assert [outcome.ok for outcome in run.outcomes] == [True] * 20


async def test_only_what_is_due_in_time_is_sent() -> None:
    async def answer(body: dict[str, object]) -> bytes:
        return ANSWER

    async with serving(answer) as target:
        run = await run_open(target, (Session(0.01 * number, ONE) for number in range(1_000)), 0.095, 30.0)
    assert (len(run.outcomes), run.offered_s) == (10, 0.095)


async def test_a_closed_loop_has_one_request_a_client() -> None:
    now, most = 0, 0

    async def answer(body: dict[str, object]) -> bytes:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0)
        now -= 1
        return ANSWER

    async with serving(answer) as target:
        run = await run_closed(target, (Session(0.0, ONE) for _ in range(100)), 3, 12, 30.0)
    assert len(run.outcomes) == 12
    assert most <= 3


async def test_a_conversation_sends_its_answers_back_and_ends_with_a_failure() -> None:
    bodies: list[dict[str, object]] = []

    async def answer(body: dict[str, object]) -> bytes:
        bodies.append(body)
        return CHAT_ANSWER if len(bodies) < 2 else b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"

    session = Session(0.0, tuple(Turn(text, 4) for text in ("one", "two", "three")))
    async with serving(answer) as target:
        run = await run_open(target, [session], 1.0, 30.0)
    assert [outcome.status for outcome in run.outcomes] == [200, 503]
    assert bodies[1]["messages"] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "word"},
        {"role": "user", "content": "two"},
    ]


async def test_no_server_and_no_end_are_outcomes() -> None:
    never = asyncio.Event()

    async def answer(body: dict[str, object]) -> bytes:
        await never.wait()
        return b""

    async with serving(answer) as target:
        silent = await ask(target, "/completions", {}, 0.05)
        never.set()
    gone = await ask(target, "/completions", {}, 5.0)
    assert (silent.ok, silent.error) == (False, "no end within 0.05 s")
    assert (gone.ok, gone.status) == (False, 0)


async def test_both_clients_see_the_same() -> None:
    async def answer(body: dict[str, object]) -> bytes:
        return ANSWER

    async with serving(answer) as target:
        awaited = await ask(target, "/completions", {}, 5.0)
        blocking = await asyncio.to_thread(ask_blocking, target, "/completions", {}, 5.0)
    gone = await asyncio.to_thread(ask_blocking, target, "/completions", {}, 5.0)
    assert (awaited.ok, awaited.text, awaited.status) == (blocking.ok, blocking.text, blocking.status)
    assert (gone.ok, gone.status) == (False, 0)


@pytest.mark.parametrize("cut", [0, 10, len(HEAD), len(HEAD) + 20])
async def test_an_answer_that_is_cut_is_a_failure(cut: int) -> None:
    async def answer(body: dict[str, object]) -> bytes:
        return ANSWER[:cut]

    async with serving(answer) as target:
        assert not (await ask(target, "/completions", {}, 5.0)).ok
