"""The process of a store node from start to end: listen, be attached to, give everything back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
import uvicorn

from kvstore.errors import Unavailable
from kvstore.store.admin import make_admin_app
from kvstore.store.config import StoreConfig, operator_socket
from kvstore.store.geometry import Geometry
from kvstore.store.opened import NodeState
from kvstore.store.operator_service import OperatorService
from kvstore.store.peer_service import PeerService
from kvstore.store.store_pb2_grpc import (
    add_StoreOperatorServicer_to_server,
    add_StorePeerServicer_to_server,
)
from kvstore.store.worker_server import WorkerServer

log = logging.getLogger(__name__)

_MAX_MESSAGE_BYTES = 16 << 20
_STOP_S = 1.0


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """Where a running node is found."""

    node_id: str
    incarnation: int
    socket_path: Path
    address: str  # host:port for other nodes and routers
    admin_address: str


@contextlib.asynccontextmanager
async def running_node(config: StoreConfig, geometry: Geometry | None = None) -> AsyncIterator[NodeInfo]:
    """A node that serves while entered; `geometry` opens it at once, otherwise the first worker does.

    Raises:
        Unavailable: a port or the socket cannot be listened on, or what the configuration names cannot be used.
    """
    state = NodeState(config)
    state.check()
    admin_socket = _listen(config.host, config.admin_port)
    workers = WorkerServer(state, config.socket_path)
    operators = _server()
    operators_path = operator_socket(config.socket_path)
    operators_path.unlink(missing_ok=True)  # the workers' socket is ours, and this one belongs to it
    operators.add_insecure_port(f"unix:{operators_path}")
    add_StoreOperatorServicer_to_server(OperatorService(state), operators)
    remote = _server()
    try:
        port = config.control.listen(remote, f"{config.host}:{config.port}")
    except RuntimeError as error:
        raise Unavailable(f"{config.host}:{config.port} cannot be listened on; choose another --port") from error
    admin = uvicorn.Server(uvicorn.Config(make_admin_app(state), log_level="warning", lifespan="off"))
    admin_task = asyncio.create_task(_serve_admin(admin, admin_socket), name="admin port")
    add_StorePeerServicer_to_server(PeerService(state), remote)
    address = state.address = f"{config.host}:{port}"
    try:
        if geometry is not None:
            await state.open(geometry)
        await remote.start()
        await operators.start()
        os.chmod(operators_path, 0o600)
        await workers.start()
        yield NodeInfo(
            config.node_id,
            state.incarnation,
            config.socket_path,
            address,
            f"{config.host}:{admin_socket.getsockname()[1]}",
        )
    finally:
        state.ending.set()
        workers.close()
        await asyncio.gather(operators.stop(_STOP_S), remote.stop(_STOP_S))
        await state.close()
        admin.should_exit = True
        await asyncio.wait([admin_task], timeout=_STOP_S)
        for path in (config.socket_path, operators_path):
            with contextlib.suppress(OSError):
                path.unlink()


async def run(config: StoreConfig, geometry: Geometry | None, ready: Callable[[NodeInfo], None]) -> None:
    """Serve until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with running_node(config, geometry) as info:
        log.info("store node %s serves on %s and %s", info.node_id, info.socket_path, info.address)
        ready(info)
        await stop.wait()
        log.info("store node %s is ending", info.node_id)


def _server() -> grpc.aio.Server:
    return grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
            ("grpc.http2.min_ping_interval_without_data_ms", 1000),  # who watches asks whether we are alive
            ("grpc.so_reuseport", 0),
        ]
    )


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), reuse_port=False)
    except OSError as error:
        reason = error.strerror or str(error)
        raise Unavailable(f"{host}:{port} cannot be listened on ({reason}); choose another --admin-port") from error


async def _serve_admin(server: uvicorn.Server, listening: socket.socket) -> None:
    with contextlib.closing(listening):
        await server._serve([listening])  # `serve` would take over the process's signals
