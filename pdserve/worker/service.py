"""The gRPC edge of a worker: streams in, messages out. All decisions are the worker's."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio

from kvstore.errors import TransferError
from pdserve.protocol import PROTOCOL_VERSION
from pdserve.protocol import worker_pb2 as pb
from pdserve.protocol.worker_pb2_grpc import WorkerServicer
from pdserve.worker.role_change import RoleChangeRefused
from pdserve.worker.session import RouterSession
from pdserve.worker.worker import Worker

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
_HELLO_TIMEOUT_S = 5.0


class WorkerService(WorkerServicer):
    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    async def Session(
        self, request_iterator: AsyncIterator[pb.RouterMessage], context: Context
    ) -> AsyncIterator[pb.WorkerMessage]:
        """The end of either direction ends the session, and with it every request that came in on it."""
        router_id = await self._greet(request_iterator, context)
        session = RouterSession(router_id)
        reader = asyncio.create_task(self._read(session, request_iterator), name=f"session of {router_id}")
        try:
            self._worker.open_session(session)
            while (message := await session.next()) is not None:
                yield message
        finally:
            reader.cancel()
            self._worker.close_session(session)

    async def _greet(self, messages: AsyncIterator[pb.RouterMessage], context: Context) -> str:
        try:
            async with asyncio.timeout(_HELLO_TIMEOUT_S):
                first = await anext(messages)
        except (TimeoutError, StopAsyncIteration):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a session begins with a hello")
        if first.WhichOneof("body") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a session begins with a hello")
        if first.hello.protocol_version != PROTOCOL_VERSION:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"this worker speaks protocol version {PROTOCOL_VERSION}, the router {first.hello.protocol_version}",
            )
        return first.hello.router_id

    async def _read(self, session: RouterSession, messages: AsyncIterator[pb.RouterMessage]) -> None:
        try:
            async for message in messages:
                self._worker.handle(session, message)
        except grpc.aio.AioRpcError as error:
            log.info("the session of %s broke: %s", session.router_id, error.details())
        except Exception:  # a bug of ours must not leave a deaf session behind
            log.exception("the session of %s ends because of an error", session.router_id)
        session.end()

    async def Connect(self, request: pb.ConnectRequest, context: Context) -> pb.ConnectReply:
        try:
            return await self._worker.links.accept(request)
        except TransferError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
            raise

    async def ChangeRole(self, request: pb.ChangeRoleRequest, context: Context) -> pb.RoleReport:
        try:
            return self._worker.roles.ask(request.role, request.drain_s)
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            raise
        except RoleChangeRefused as refused:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(refused))
            raise

    async def Fence(self, request: pb.FenceRequest, context: Context) -> pb.FenceReply:
        return await self._worker.prefill.fence(request)
