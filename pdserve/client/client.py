"""Calls one endpoint of a component on an instance of the caller's or the client's choice.

A request is sent at most once: another instance is tried only when the one before could not be dialled or refused
before its handler began. After that a failure is the caller's to judge, since the handler may have run.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import grpc
import grpc.aio

from kvstore.background import keep_running
from kvstore.control_plane import IN_THE_CLEAR, ControlPlane
from pdserve.client.channels import Channels
from pdserve.client.errors import CallLost, CallTimeout, HandlerFailed, NoInstances, NotStarted
from pdserve.client.instances import POLL_S, Instances, OnChange
from pdserve.discovery import Discovery, Endpoint
from pdserve.protocol import COMPONENT_PROTOCOL_VERSION
from pdserve.protocol.component_pb2 import ComponentCall
from pdserve.protocol.component_pb2_grpc import ComponentStub

MAX_REQUEST_BYTES = (4 << 20) - 1024  # gRPC's limit on a message, less what else is in it
_REFUSALS = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNIMPLEMENTED)


class Client:
    """Use it as an async context manager; it closes `discovery` too.

    Each call is an async generator of the answer's parts. Leave it early under `contextlib.aclosing`: that cancels the
    handler at once. Calls raise the errors of `pdserve.client.errors`; `timeout_s` covers the whole call.
    """

    def __init__(
        self,
        discovery: Discovery,
        endpoint: str,
        *,
        plane: ControlPlane = IN_THE_CLEAR,
        seed: int | None = None,
        poll_s: float = POLL_S,
    ) -> None:
        self._discovery = discovery
        self._endpoint = endpoint
        self._instances = Instances(discovery)
        self._channels = Channels(plane)
        self._random = random.Random(seed)
        self._turn = 0
        self._poll_s = poll_s
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Client:
        await self._instances.poll()
        self._task = keep_running(self._poll_forever, f"instances of {self._endpoint}")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._channels.close()
        await self._discovery.close()

    def instances(self) -> tuple[Endpoint, ...]:
        """Those that can be called, by id."""
        return self._instances.usable

    async def wait_for_instances(self, count: int, timeout_s: float) -> tuple[Endpoint, ...]:
        """Raises NoInstances if there are fewer than `count` by then."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._instances.wait_for(count)
        except TimeoutError:
            found = len(self.instances())
            raise NoInstances(
                f"{found} of {count} instances are there after {timeout_s:g} s{self._instances.doubt}"
            ) from None
        return self.instances()

    def watch(self, on_change: OnChange) -> None:
        """Calls it with the instances whenever they have changed."""
        self._instances.watch(on_change)

    def round_robin(self, request: bytes, *, timeout_s: float | None = None) -> AsyncGenerator[bytes]:
        _check_size(request)
        instances = self._instances.some()
        first = self._turn % len(instances)
        self._turn += 1
        return self._first_that_starts(instances[first:] + instances[:first], request, timeout_s)

    def random(self, request: bytes, *, timeout_s: float | None = None) -> AsyncGenerator[bytes]:
        _check_size(request)
        instances = self._instances.some()
        return self._first_that_starts(self._random.sample(instances, len(instances)), request, timeout_s)

    def direct(self, request: bytes, instance_id: str, *, timeout_s: float | None = None) -> AsyncGenerator[bytes]:
        _check_size(request)
        return self._call(self._instances.one(instance_id), request, _end_s(timeout_s))

    async def _first_that_starts(
        self, order: Sequence[Endpoint], request: bytes, timeout_s: float | None
    ) -> AsyncGenerator[bytes]:
        end_s, reasons = _end_s(timeout_s), []
        for instance in order:
            try:
                async with aclosing(self._call(instance, request, end_s)) as replies:
                    async for reply in replies:
                        yield reply
                return
            except NotStarted as error:
                reasons.append(error.message)
        raise NoInstances(f"none of {len(order)} instances took the call: {'; '.join(reasons)}")

    async def _call(self, instance: Endpoint, request: bytes, end_s: float | None) -> AsyncGenerator[bytes]:
        name = f"instance {instance.endpoint_id}"
        async with contextlib.AsyncExitStack() as stack:
            try:
                async with asyncio.timeout_at(end_s):
                    channel = await stack.enter_async_context(self._channels.connected(instance.address))
            except TimeoutError:
                raise CallTimeout(f"{name} could not be dialled in time") from None
            message = ComponentCall(
                protocol_version=COMPONENT_PROTOCOL_VERSION, endpoint=self._endpoint, payload=request
            )
            call = ComponentStub(channel).Call(message, timeout=_left_s(end_s))
            stack.callback(call.cancel)
            begun = False
            try:
                async for reply in call:
                    begun = True
                    if reply.HasField("failure"):
                        raise HandlerFailed(reply.failure.code, reply.failure.message)
                    yield reply.payload
            except grpc.aio.AioRpcError as error:
                details = error.details() or error.code().name
                if error.code() in _REFUSALS and not begun:
                    raise NotStarted(f"{name}: {details}") from error
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise CallTimeout(f"{name} did not end its answer in time") from error
                raise CallLost(f"{name} was lost during the call: {details}") from error
            except asyncio.CancelledError:
                # gRPC raises it too when it is the other side that cancels.
                if _is_cancelled():
                    raise
                raise CallLost(f"{name} cancelled the call") from None

    async def _poll_forever(self) -> None:
        while True:
            await asyncio.sleep(self._poll_s)
            await self._instances.poll()
            await self._channels.keep(self._instances.addresses)


def _check_size(request: bytes) -> None:
    if len(request) > MAX_REQUEST_BYTES:
        raise NotStarted(f"a component takes requests of up to {MAX_REQUEST_BYTES} bytes, not of {len(request)}")


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _end_s(timeout_s: float | None) -> float | None:
    """On the loop's clock."""
    return None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s


def _left_s(end_s: float | None) -> float | None:
    return None if end_s is None else max(0.0, end_s - asyncio.get_running_loop().time())
