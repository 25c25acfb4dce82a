"""Which instance a call goes to, and how it ends."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from pathlib import Path

import grpc
import grpc.aio
import pytest
import trustme

from kvstore.control_plane import MutualTls
from pdserve.client import CallLost, CallTimeout, Client, Handler, HandlerFailed, NoInstances, NotStarted, Server, serve
from pdserve.client.client import MAX_REQUEST_BYTES
from pdserve.client.server import _Service
from pdserve.discovery import StaticDiscovery
from pdserve.protocol import COMPONENT_PROTOCOL_VERSION
from pdserve.protocol.component_pb2 import ComponentCall, ComponentReply
from pdserve.protocol.component_pb2_grpc import ComponentStub
from tests.pdserve.client.support import Fails, Held, tells, too_long, who
from tests.support.certificates import write_certificates
from tests.support.documented import block


def client_of(*addresses: str, seed: int | None = None) -> Client:
    return Client(StaticDiscovery(addresses), "tell", seed=seed)


async def one(handler: Handler, *, drain_s: float = 0.0) -> Server:
    return await serve("test", {"tell": handler}, drain_s=drain_s)


@pytest.fixture
async def three() -> AsyncIterator[list[str]]:
    """Addresses, where each tells its own number."""
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(await one(tells(str(index)))) for index in range(3)]
        yield [server.instance.address for server in servers]


@pytest.fixture
def dead() -> str:
    """An address where nobody listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{unused.getsockname()[1]}"


async def test_round_robin_takes_turns(three: list[str]) -> None:
    async with client_of(*three) as client:
        turns = [await who(client) for _ in range(9)]
    assert turns == turns[:3] * 3
    assert set(turns) == {"0", "1", "2"}


async def test_random_is_even_and_repeats_with_its_seed(three: list[str]) -> None:
    async def chosen(seed: int) -> list[bytes]:
        async with client_of(*three, seed=seed) as client:
            return [await anext(client.random(b"")) for _ in range(60)]

    first = await chosen(5)
    assert first == await chosen(5)
    assert first != await chosen(6)
    assert min(Counter(first).values()) > 8


async def test_direct_goes_where_it_is_told(three: list[str]) -> None:
    async with client_of(*three) as client:
        for index, address in enumerate(three):
            assert [part async for part in client.direct(b"x", address)] == [str(index).encode(), b"x"]


async def test_one_that_cannot_be_dialled_is_passed_by_except_by_direct(three: list[str], dead: str) -> None:
    async with client_of(dead, *three) as client:
        assert {await who(client) for _ in range(8)} == {"0", "1", "2"}
        with pytest.raises(NotStarted, match="cannot be dialled"):
            await anext(client.direct(b"", dead))
    async with client_of(dead) as client:
        with pytest.raises(NoInstances, match=f"none of 1 instances took the call: {dead} cannot be dialled"):
            await who(client)


async def test_the_largest_request_is_taken_and_a_larger_one_reaches_nobody(three: list[str]) -> None:
    async with client_of(*three) as client:
        largest = bytes(MAX_REQUEST_BYTES)
        assert [reply async for reply in client.direct(largest, three[0])] == [b"0", largest]
        with pytest.raises(NotStarted, match=f"takes requests of up to {MAX_REQUEST_BYTES} bytes"):
            await anext(client.direct(largest + b"x", three[0]))
        for any_of_them in (client.round_robin, client.random):
            with pytest.raises(NotStarted, match="takes requests of up to"):
                await anext(any_of_them(largest + b"x"))


async def test_an_endpoint_that_nobody_has_is_named(three: list[str]) -> None:
    async with Client(StaticDiscovery(three), "sing") as client:
        with pytest.raises(NoInstances, match=r"none of 3 .* it has no endpoint sing"):
            await who(client)


async def test_a_caller_of_another_version_is_refused_in_clear_text(three: list[str]) -> None:
    async with grpc.aio.insecure_channel(three[0]) as channel:
        call = ComponentStub(channel).Call(ComponentCall(protocol_version=9, endpoint="tell"))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call.read()
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert refused.value.details() == "it speaks protocol version 1, the caller 9"


async def test_leaving_early_reaches_the_handler() -> None:
    held = Held()
    async with await one(held.handler) as server, client_of(server.instance.address) as client:
        async with aclosing(client.round_robin(b"")) as replies:
            assert await anext(replies) == b"first"
            assert not held.ended.is_set()
        async with asyncio.timeout(60):
            await held.ended.wait()


async def test_a_cancelled_caller_cancels_the_handler() -> None:
    held = Held()
    began = asyncio.Event()

    async def calls(client: Client) -> None:
        async for _ in client.round_robin(b""):
            began.set()

    async with await one(held.handler) as server, client_of(server.instance.address) as client:
        caller = asyncio.create_task(calls(client))
        async with asyncio.timeout(60):
            await began.wait()
            caller.cancel()
            with pytest.raises(asyncio.CancelledError):
                await caller
            await held.ended.wait()


async def test_the_time_of_the_caller_ends_the_handler() -> None:
    held = Held()
    async with await one(held.handler) as server, client_of(server.instance.address) as client:
        with pytest.raises(CallTimeout):
            [part async for part in client.round_robin(b"", timeout_s=0.5)]
        async with asyncio.timeout(60):
            await held.ended.wait()


@pytest.mark.parametrize("after", [0, 2])
async def test_what_a_handler_raises_comes_with_code_and_sentence_after_its_parts(after: int) -> None:
    async with await one(too_long(after).handler) as server, client_of(server.instance.address) as client:
        replies = client.round_robin(b"")
        assert [await anext(replies) for _ in range(after)] == [b"part"] * after
        with pytest.raises(HandlerFailed, match="the text is too long") as failed:
            await anext(replies)
    assert failed.value.code == "too_long"


async def test_a_bug_of_a_handler_tells_no_internals(caplog: pytest.LogCaptureFixture) -> None:
    secret = Fails(RuntimeError("password"))
    async with await one(secret.handler) as server, client_of(server.instance.address) as client:
        with pytest.raises(HandlerFailed) as failed:
            await who(client)
    assert failed.value.code == "internal"
    assert "password" not in failed.value.message
    assert "password" in caplog.text


async def test_a_call_longer_than_the_drain_ends_with_a_reason() -> None:
    held = Held()
    server = await one(held.handler, drain_s=0.2)
    async with client_of(server.instance.address) as client:
        running = client.round_robin(b"")
        assert await anext(running) == b"first"
        await server.close()
        with pytest.raises(HandlerFailed) as failed:
            await anext(running)
    assert failed.value.code == "draining"
    assert held.ended.is_set()


async def test_a_call_that_began_is_never_tried_elsewhere(three: list[str]) -> None:
    """Not even when its instance dies."""
    held = Held()
    server = await one(held.handler)
    async with client_of(server.instance.address, *three) as client:
        running = client.direct(b"", server.instance.address)
        assert await anext(running) == b"first"
        await server._server.stop(None)
        with pytest.raises(CallLost):
            await anext(running)


async def test_tls_hears_only_the_deployments_own(tmp_path: Path) -> None:
    ours, foreign = trustme.CA(), trustme.CA()
    plane = MutualTls(write_certificates(tmp_path / "ours", ours))
    async with await serve("test", {"tell": tells("a")}, plane=plane) as server:
        static = StaticDiscovery([server.instance.address])
        async with Client(static, "tell", plane=plane) as client:
            assert await who(client) == "a"
        stranger = MutualTls(write_certificates(tmp_path / "foreign", foreign))
        async with Client(static, "tell", plane=stranger) as client:
            with pytest.raises(NoInstances, match="cannot be dialled"):
                await who(client)


async def test_the_documented_example(redis_url: str) -> None:
    names: dict[str, object] = {"__name__": "example"}
    exec(block("components.md", "import asyncio").text, names)
    main = names["main"]
    assert callable(main)
    assert await main(redis_url) == ["prefill", "then", "decode"]


async def test_a_server_drains_while_a_failure_is_being_told() -> None:
    """The handler is over then, and with it the limit on its time."""

    class Slow:
        def __init__(self) -> None:
            self.writes, self.may_go_on = asyncio.Event(), asyncio.Event()

        async def write(self, reply: ComponentReply) -> None:
            self.writes.set()
            await self.may_go_on.wait()

    async def fails(request: bytes) -> AsyncIterator[bytes]:
        raise HandlerFailed("full", "no room")
        yield b""

    service, context = _Service({"tell": fails}), Slow()
    request = ComponentCall(protocol_version=COMPONENT_PROTOCOL_VERSION, endpoint="tell")
    call = asyncio.create_task(service.Call(request, context))  # type: ignore[arg-type]
    await context.writes.wait()
    drain = asyncio.create_task(service.drain(60.0))
    await asyncio.sleep(0)
    assert not drain.done(), "the failure is not told yet"
    context.may_go_on.set()
    await asyncio.gather(call, drain)
