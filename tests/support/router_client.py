"""A router's side of one session, scripted by a test: it sends what the test says and records all that comes back."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc.aio

from pdserve.protocol import PROTOCOL_VERSION, codec
from pdserve.protocol import worker_pb2 as pb
from pdserve.protocol.worker_pb2_grpc import WorkerStub
from pdserve.request import SamplingParams
from tests.support.oracle_model import undisturbed
from tests.support.tiny_engine import GEOMETRY, ROOT

T = TypeVar("T")

DEADLINE_S = 20.0  # of every wait in these tests: far beyond what a busy machine needs


@dataclass(frozen=True)
class Ask:
    """A request as a client would make it, at one of its attempts."""

    request_id: str
    prompt: tuple[int, ...]
    max_tokens: int = 6
    stop_token_ids: tuple[int, ...] = ()
    temperature: float = 0.0
    attempt: int = 0
    output: tuple[int, ...] = ()  # delivered by earlier attempts
    remaining_s: float = 60.0
    root_key: bytes = field(default=ROOT, repr=False)

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.max_tokens, seed=7, temperature=self.temperature, stop_token_ids=self.stop_token_ids
        )

    @property
    def expected(self) -> list[int]:
        """All output tokens of the undisturbed run, those of earlier attempts included."""
        return undisturbed(self.prompt, self.sampling, GEOMETRY)

    def submit(self, *, disaggregated: bool = True) -> pb.Submit:
        return pb.Submit(
            request_id=self.request_id,
            attempt=self.attempt,
            prompt_token_ids=self.prompt,
            output_token_ids=self.output,
            sampling=codec.sampling_to_proto(self.sampling),
            root_key=self.root_key,
            disaggregated=disaggregated,
            remaining_s=self.remaining_s,
        )


class RouterClient:
    """One session. Waits look at the whole record, so a message that came early is found too."""

    def __init__(self, address: str) -> None:
        self.messages: list[pb.WorkerMessage] = []
        self.ended = False
        self._channel = grpc.aio.insecure_channel(address)
        self.stub = WorkerStub(self._channel)
        self._events: defaultdict[tuple[str, int], list[pb.TokenEvent]] = defaultdict(list)
        self._changed = asyncio.Event()
        self._outbox: asyncio.Queue[pb.RouterMessage] = asyncio.Queue()

    async def open(self) -> pb.WorkerHello:
        self._call = self.stub.Session(self._outgoing())
        self.send(hello=pb.RouterHello(protocol_version=PROTOCOL_VERSION, router_id="test"))
        self._reader = asyncio.create_task(self._read())
        return await self.wait(lambda message: message.hello if message.WhichOneof("body") == "hello" else None)

    async def close(self) -> None:
        """As a router that dies: the stream breaks, nothing is said before."""
        self._call.cancel()
        await self.wait_end()
        await self._channel.close(None)

    def send(self, **body: Any) -> None:
        self._outbox.put_nowait(pb.RouterMessage(**body))

    async def _outgoing(self) -> AsyncIterator[pb.RouterMessage]:
        while True:
            yield await self._outbox.get()

    async def _read(self) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
            async for message in self._call:
                self.messages.append(message)
                for event in message.step.tokens:
                    self._events[event.request_id, event.attempt].append(event)
                self._changed.set()
        self.ended = True
        self._changed.set()

    # --- the record --------------------------------------------------------------------------------------------------

    async def until(self, look: Callable[[], T | None]) -> T:
        """What `look` finds in the record, looking again after each message."""
        async with asyncio.timeout(DEADLINE_S):
            while (found := look()) is None:
                assert not self.ended, f"the session ended: {self._call}"
                self._changed.clear()
                await self._changed.wait()
            return found

    async def wait(self, find: Callable[[pb.WorkerMessage], T | None]) -> T:
        """What `find` makes of the first message that it takes; each is shown to it once."""
        seen = 0

        def look() -> T | None:
            nonlocal seen
            while seen < len(self.messages):
                seen += 1
                if (found := find(self.messages[seen - 1])) is not None:
                    return found
            return None

        return await self.until(look)

    async def wait_end(self) -> None:
        """The session is over."""
        async with asyncio.timeout(DEADLINE_S):
            await self._reader

    async def about(self, kind: str, ask: Ask) -> pb.WorkerMessage:
        """The first message of this kind (a field of WorkerMessage.body) about this attempt."""

        def find(message: pb.WorkerMessage) -> pb.WorkerMessage | None:
            if message.WhichOneof("body") != kind:
                return None
            body = getattr(message, kind)
            return message if (body.request_id, body.attempt) == (ask.request_id, ask.attempt) else None

        return await self.wait(find)

    async def wanted(self, ask: Ask) -> None:
        await self.about("handoff_wanted", ask)

    async def reserved(self, ask: Ask) -> pb.Ticket:
        return (await self.about("reserved", ask)).reserved.ticket

    async def reserved_or_refused(self, ask: Ask) -> pb.Ticket:
        """An empty ticket for a refusal."""

        def find(message: pb.WorkerMessage) -> pb.Ticket | None:
            answer = message.reserved if message.HasField("reserved") else message.refused
            about = (answer.request_id, answer.attempt) == (ask.request_id, ask.attempt)
            return message.reserved.ticket if about else None

        return await self.wait(find)

    async def refused(self, ask: Ask) -> str:
        return (await self.about("refused", ask)).refused.reason

    def events(self, ask: Ask) -> list[pb.TokenEvent]:
        """All token events about this attempt so far."""
        return list(self._events[ask.request_id, ask.attempt])

    async def event(self, ask: Ask, number: int = 0) -> pb.TokenEvent:
        """The `number`-th token event about this attempt."""
        return await self.until(lambda: self.events(ask)[number] if len(self.events(ask)) > number else None)

    async def finished(self, ask: Ask) -> pb.TokenEvent:
        """The event that ends this attempt on this worker."""
        return await self.until(lambda: next((e for e in self.events(ask) if e.finish != pb.RUNNING), None))

    async def failed(self, ask: Ask) -> str:
        """Why it failed."""
        event = await self.finished(ask)
        assert (event.finish, event.no_token) == (pb.ERROR, True), event
        return event.error

    async def link(self, peer_id: str, *, up: bool, incarnation: int | None = None, since: int = 0) -> pb.LinkReport:
        """The first report after message `since` on this link in this state."""

        def find(message: pb.WorkerMessage) -> pb.LinkReport | None:
            report = message.link
            fits = incarnation is None or report.peer_incarnation == incarnation
            return report if report.peer_id == peer_id and report.up is up and fits else None

        return await self.until(lambda: next(filter(None, map(find, self.messages[since:])), None))
