"""Serves the endpoints of a component and keeps them listed.

serve     listen, then register under a lease
close     the record goes, new calls are refused, running ones get `drain_s` to end, the port closes
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping

import grpc
import grpc.aio

from kvstore.control_plane import IN_THE_CLEAR, ControlPlane
from pdserve.client.errors import HandlerFailed
from pdserve.discovery import LEASE_RENEW_S, LEASE_TTL_S, Endpoint, Lease
from pdserve.errors import ConfigError
from pdserve.protocol import COMPONENT_PROTOCOL_VERSION
from pdserve.protocol.component_pb2 import ComponentCall, ComponentFailure, ComponentReply
from pdserve.protocol.component_pb2_grpc import ComponentServicer, add_ComponentServicer_to_server

log = logging.getLogger(__name__)

# Takes the request, yields the parts of the answer. Cancelled when the caller leaves or its time is up.
Handler = Callable[[bytes], AsyncIterator[bytes]]
_Context = grpc.aio.ServicerContext[ComponentCall, ComponentReply]
# For handlers to clean up in, once they are cancelled.
_ENDING_S = 1.0
_ANY_HOST = ("", "0.0.0.0", "[::]")


class _Service(ComponentServicer):
    def __init__(self, handlers: Mapping[str, Handler]) -> None:
        self._handlers = dict(handlers)
        self._calls = 0  # not answered to their end
        self._running: set[asyncio.Timeout] = set()  # of handlers
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False

    async def Call(self, request: ComponentCall, context: _Context) -> None:
        handler = await self._admit(request, context)
        limit = asyncio.timeout(None)
        self._calls += 1
        self._idle.clear()
        try:
            async with limit:
                self._running.add(limit)
                try:
                    await _answer(handler(request.payload), context)
                finally:
                    self._running.discard(limit)  # one that is over cannot be moved any more
        except HandlerFailed as error:
            await _fail(context, error.code, error.message)
        except Exception:
            if limit.expired():
                await _fail(context, "draining", "the instance is going away, and the call took longer than it waits")
            else:
                log.exception("the handler of %s failed", request.endpoint)
                await _fail(context, "internal", "the handler failed; the log of its instance says why")
        finally:
            self._calls -= 1
            if not self._calls:
                self._idle.set()

    async def drain(self, within_s: float) -> None:
        self._draining = True
        end_s = asyncio.get_running_loop().time() + within_s
        for limit in self._running:
            if not limit.expired():
                limit.reschedule(end_s)
        # A handler that ignores its cancellation ends with the server.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(end_s + _ENDING_S):
                await self._idle.wait()

    async def _admit(self, request: ComponentCall, context: _Context) -> Handler:
        """Aborts with a status that says that no handler has begun."""
        if request.protocol_version != COMPONENT_PROTOCOL_VERSION:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"it speaks protocol version {COMPONENT_PROTOCOL_VERSION}, the caller {request.protocol_version}",
            )
        if self._draining:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "it is draining")
        handler = self._handlers.get(request.endpoint)
        if handler is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"it has no endpoint {request.endpoint}")
        return handler


async def _answer(replies: AsyncIterator[bytes], context: _Context) -> None:
    async with contextlib.AsyncExitStack() as stack:
        if isinstance(replies, AsyncGenerator):
            # A call that is cancelled between two parts must reach the handler too.
            await stack.enter_async_context(contextlib.aclosing(replies))
        async for payload in replies:
            await context.write(ComponentReply(payload=payload))


async def _fail(context: _Context, code: str, message: str) -> None:
    await context.write(ComponentReply(failure=ComponentFailure(code=code, message=message)))


class Server:
    """Made by `serve`; an async context manager that closes at its end."""

    def __init__(
        self, server: grpc.aio.Server, service: _Service, lease: Lease | None, endpoint: Endpoint, drain_s: float
    ) -> None:
        self.instance = endpoint
        self._server = server
        self._service = service
        self._lease = lease
        self._drain_s = drain_s

    async def close(self) -> None:
        """Takes at most about `drain_s`."""
        if self._lease is not None:
            await self._lease.__aexit__()
            self._lease = None
        await self._service.drain(self._drain_s)
        await self._server.stop(None)

    async def __aenter__(self) -> Server:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


async def serve(
    component: str,
    handlers: Mapping[str, Handler],
    *,
    redis_url: str | None = None,
    namespace: str = "default",
    instance_id: str | None = None,
    listen: str = "127.0.0.1:0",
    advertise_host: str | None = None,
    plane: ControlPlane = IN_THE_CLEAR,
    drain_s: float = 30.0,
    lease_ttl_s: int = LEASE_TTL_S,
) -> Server:
    """Answers calls of these endpoints while the result is held, and is listed in Redis if there is one.

    `advertise_host` is where others find what listens on every address. Raises ConfigError.
    """
    host = listen.rpartition(":")[0]
    if advertise_host is None and redis_url is not None and host in _ANY_HOST:
        raise ConfigError(f"{listen} is no address that others can dial: name one in advertise_host")
    server = grpc.aio.server(options=[("grpc.http2.min_ping_interval_without_data_ms", 1000), ("grpc.so_reuseport", 0)])
    service = _Service(handlers)
    add_ComponentServicer_to_server(service, server)
    try:
        port = plane.listen(server, listen)
    except RuntimeError as error:
        raise ConfigError(f"cannot listen on {listen}") from error
    await server.start()
    instance = Endpoint(
        namespace=namespace,
        component=component,
        endpoint_id=instance_id or uuid.uuid4().hex[:12],
        address=f"{advertise_host or host}:{port}",
        incarnation=time.time_ns(),
        protocol_version=COMPONENT_PROTOCOL_VERSION,
    )
    lease = None
    if redis_url is not None:
        lease = Lease(redis_url, instance, ttl_s=lease_ttl_s, renew_s=min(LEASE_RENEW_S, lease_ttl_s / 3))
        await lease.__aenter__()
    log.info("serving %s of %s as %s on %s", sorted(handlers), component, instance.endpoint_id, instance.address)
    return Server(server, service, lease, instance, drain_s)
