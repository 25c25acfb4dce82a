"""One session to one worker, dialled again for as long as its address is listed.

    DIALLING ──hello──> UP <──silence 3 s──> SUSPECT ──silence 5 s, stream end, broken protocol──┐
        ^                                                                                        │
        └───────────────────────────────── backoff ── DOWN (told once) <─────────────────────────┘

Ending the session is what tells the worker to abort every request of this router, so a session that is given up is
always cancelled. Messages leave in the order of `send`, through one bounded queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any, Protocol

import grpc

from kvstore.control_plane import KEEPALIVE, ControlPlane
from kvstore.errors import Unavailable
from pdserve.protocol import PROTOCOL_VERSION
from pdserve.protocol.worker_pb2 import (
    ChangeRoleRequest,
    Ping,
    RoleReport,
    RouterHello,
    RouterMessage,
    WorkerHello,
    WorkerMessage,
)
from pdserve.protocol.worker_pb2_grpc import WorkerStub
from router.limits import LinkLimits

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 64 << 20
_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),  # each session dials anew, without the backoff of the one before
    *KEEPALIVE,
)


class LinkListener(Protocol):
    """Called in the event loop. Between `link_up` and `link_down`, each called once a session, come the others."""

    def link_up(self, link: WorkerLink, hello: WorkerHello) -> None: ...

    def link_message(self, link: WorkerLink, message: WorkerMessage) -> None:
        """Raises ValueError for a message that no correct worker sends; the session ends."""
        ...

    def link_silent(self, link: WorkerLink) -> None:
        """`link.suspect` changed."""
        ...

    def link_down(self, link: WorkerLink, reason: str) -> None:
        """`reason` is empty when this side closed the link."""
        ...


class WorkerLink:
    def __init__(
        self, address: str, router_id: str, listener: LinkListener, limits: LinkLimits, control: ControlPlane
    ) -> None:
        self.address = address
        self.up = False
        self.suspect = False
        self.last_error = ""  # why the last session ended
        self._router_id = router_id
        self._listener = listener
        self._limits = limits
        self._control = control
        self._outbox: asyncio.Queue[RouterMessage] = asyncio.Queue()
        self._ended: asyncio.Future[str] | None = None
        self._silent_s = 0.0
        self._stub: Any = None  # of the session that is up
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"link {self.address}")

    async def close(self) -> None:
        """End the session, which aborts its requests on the worker, and dial no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def send(self, message: RouterMessage) -> bool:
        """Queue a message; False when there is no session or the worker does not read."""
        if not self.up:
            return False
        try:
            self._outbox.put_nowait(message)
        except asyncio.QueueFull:
            self._end("the worker does not read what it is sent")
            return False
        return True

    async def change_role(self, request: ChangeRoleRequest) -> RoleReport:
        """
        Raises:
            ConnectionError: there is no session.
            grpc.aio.AioRpcError: the worker refuses, or does not answer in time.
        """
        if not self.up:
            raise ConnectionError(self.last_error or "it was not reached yet")
        report: RoleReport = await self._stub.ChangeRole(request, timeout=self._limits.hello_s)
        return report

    def renew(self, reason: str) -> None:
        """End the session and begin a new one."""
        self._end(reason)

    def _end(self, reason: str) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(reason)

    async def _run(self) -> None:
        backoff_s = self._limits.backoff_min_s
        while True:
            was_up = await self._session()
            backoff_s = self._limits.backoff_min_s if was_up else min(2 * backoff_s, self._limits.backoff_max_s)
            await asyncio.sleep(backoff_s)

    async def _session(self) -> bool:
        """One session from dialling to its end; whether it came up."""
        self._outbox = asyncio.Queue(self._limits.outbox_messages)
        self._ended = asyncio.get_running_loop().create_future()
        self._silent_s = 0.0
        self.suspect = False
        was_up = False
        reason = ""
        try:
            channel = self._control.channel(self.address, _OPTIONS)
        except Unavailable as error:
            self.last_error = str(error)
            return False
        self._stub = WorkerStub(channel)
        call = self._stub.Session()
        tasks: list[asyncio.Task[None]] = []
        try:
            messages = aiter(call)
            hello = await self._shake_hands(call, messages)
            self.up = was_up = True
            self._listener.link_up(self, hello)
            parts = (self._read(messages), self._write(call), self._watch())
            tasks = [asyncio.create_task(self._guard(part)) for part in parts]
            reason = await self._ended
        except (grpc.aio.AioRpcError, grpc.aio.BaseError, TimeoutError, ValueError) as error:
            reason = _sentence(error)
        finally:
            self.up = False
            self.last_error = reason
            for task in tasks:
                task.cancel()
            if was_up:
                self._listener.link_down(self, reason)
            call.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await channel.close(None)
        return was_up

    async def _shake_hands(self, call: Any, messages: AsyncIterator[WorkerMessage]) -> WorkerHello:
        async with asyncio.timeout(self._limits.hello_s):
            greeting = RouterHello(protocol_version=PROTOCOL_VERSION, router_id=self._router_id)
            await call.write(RouterMessage(hello=greeting))
            first = await anext(messages, None)
        if first is None or first.WhichOneof("body") != "hello":
            raise ValueError("the worker did not begin with a hello")
        hello = first.hello
        if hello.protocol_version != PROTOCOL_VERSION:
            raise ValueError(f"protocol version {hello.protocol_version}, this router speaks {PROTOCOL_VERSION}")
        if not hello.worker_id:
            raise ValueError("the worker has no worker_id")
        return hello

    async def _guard(self, part: Awaitable[None]) -> None:
        """The session's edge: whatever goes wrong in one of its parts ends the session with a reason."""
        try:
            await part
            self._end("the worker ended the session")
        except (grpc.aio.AioRpcError, grpc.aio.BaseError, TimeoutError, ValueError) as error:
            self._end(_sentence(error))
        except Exception as error:
            log.exception("link %s: a bug ended the session", self.address)
            self._end(f"internal error: {type(error).__name__}")

    async def _read(self, messages: AsyncIterator[WorkerMessage]) -> None:
        async for message in messages:
            self._silent_s = 0.0
            if message.WhichOneof("body") != "pong":
                self._listener.link_message(self, message)

    async def _write(self, call: Any) -> None:
        with contextlib.suppress(asyncio.InvalidStateError):  # the call has ended; `_read` hears why
            while True:
                await call.write(await self._outbox.get())

    async def _watch(self) -> None:
        """Ping, and count silence in ticks: a pause of this process is not the worker's silence."""
        limits = self._limits
        sequence = 0
        before_s = time.monotonic()
        while self._silent_s < limits.dead_s:
            sequence += 1
            self.send(RouterMessage(ping=Ping(sequence=sequence)))
            await asyncio.sleep(limits.ping_s)
            now_s = time.monotonic()
            self._silent_s += min(now_s - before_s, 2 * limits.ping_s)
            before_s = now_s
            suspect = self._silent_s >= limits.suspect_s
            if suspect != self.suspect:
                self.suspect = suspect
                self._listener.link_silent(self)
        raise TimeoutError(f"silent for {limits.dead_s:g} s")


def _sentence(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error) or ("no hello in time" if isinstance(error, TimeoutError) else type(error).__name__)
