"""One worker process from start to end: build, listen, be found, serve, drain.

Start-up order: weights and pool, engine thread, transport, gRPC and admin ports, then the lease that lets routers find
us. Shutdown is the reverse: first nobody finds us, then sessions end (which gives every block back), then threads stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import signal
import socket
from collections.abc import AsyncIterator, Callable

import grpc.aio
import uvicorn
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvstore.errors import Unavailable
from kvstore.host import host_id
from kvstore.store.client import StoreClient
from kvstore.transfer.transport import Memory, Transport
from pdserve import vllm_names
from pdserve.discovery import Endpoint, Lease
from pdserve.errors import ConfigError
from pdserve.grammars import Grammars
from pdserve.protocol import PROTOCOL_VERSION
from pdserve.protocol import worker_pb2 as pb
from pdserve.protocol.worker_pb2_grpc import add_WorkerServicer_to_server
from pdserve.vllm_names import VllmNames
from pdserve.worker.admin import make_admin_app
from pdserve.worker.build import Built
from pdserve.worker.config import WorkerConfig
from pdserve.worker.data_plane import open_transport
from pdserve.worker.engine_thread import EngineThread
from pdserve.worker.link_metrics import LinkCollector
from pdserve.worker.links import CHANNEL_OPTIONS, LinkTable
from pdserve.worker.memory import BlockMemory, HostBlocks, PinnedArena, block_memory
from pdserve.worker.metrics import WorkerMetrics
from pdserve.worker.service import WorkerService
from pdserve.worker.store_side import StoreSide
from pdserve.worker.worker import Worker

log = logging.getLogger(__name__)

_MAX_MESSAGE_BYTES = 64 << 20
_STOP_S = 1.0
_SERVICE = pb.DESCRIPTOR.services_by_name["Worker"].full_name


@contextlib.asynccontextmanager
async def running_worker(
    config: WorkerConfig, built: Built, transport: Transport, scratch: Memory | None = None
) -> AsyncIterator[pb.WorkerHello]:
    """A worker that serves while entered; yields what it tells routers about itself. Closes the transport at the end.

    Args:
        scratch: as of `LinkTable`.

    Raises:
        ConfigError: a port is taken.
    """
    admin_socket = _listen(config.host, config.admin_port)
    server, port = _make_server(config)
    hello = _make_hello(config, built, f"{config.host}:{port}", f"{config.host}:{admin_socket.getsockname()[1]}")
    loop = asyncio.get_running_loop()
    engine = EngineThread(built.engine, loop)
    links = LinkTable(hello, transport, config.limits.link, config.control, scratch)
    memory, metrics = block_memory(built.engine.runner.pool), WorkerMetrics(config.role.value)
    metrics.set_pool(hello)
    metrics.registry.register(LinkCollector(links.reports))
    if config.vllm_names:
        metrics.registry.register(VllmNames(metrics.registry, vllm_names.WORKER, config.model.name))
    store = await _attach_store(config, hello, engine, memory, metrics)
    grammars = Grammars(config.model / "tokenizer.json", hello.vocab_size, hello.eos_token_ids)
    worker = Worker(hello, engine, grammars, links, memory, metrics, config.limits, store)
    engine.start(worker)
    healthy = _add_services(server, worker)
    admin = uvicorn.Server(uvicorn.Config(make_admin_app(worker, config.limits), log_level="warning", lifespan="off"))
    admin_task = asyncio.create_task(_serve_admin(admin, admin_socket), name="admin port")
    watch = asyncio.create_task(worker.watch(), name="watch")
    watch.add_done_callback(_end_process)
    await server.start()
    await healthy.set(_SERVICE, health_pb2.HealthCheckResponse.SERVING)
    try:
        async with _lease(config, hello) as lease:
            if lease is not None:
                worker.on_role = lambda report: lease.update(role=pb.Role.Name(report.role).lower())
            yield hello
    finally:
        watch.cancel()
        worker.roles.stop()
        await healthy.enter_graceful_shutdown()
        await server.stop(None)  # ends the sessions, which ends every request
        if store is not None:
            await store.close(_STOP_S)
        await links.shut_down()
        await engine.stop(_STOP_S)
        await loop.run_in_executor(None, transport.close)
        admin.should_exit = True
        await asyncio.wait([admin_task], timeout=_STOP_S)


async def _attach_store(
    config: WorkerConfig, hello: pb.WorkerHello, engine: EngineThread, memory: BlockMemory, metrics: WorkerMetrics
) -> StoreSide | None:
    """None without a store, or with one that is another model's: the worker serves all the same."""
    if config.store is None:
        return None
    try:
        client = await StoreClient.attach(
            config.store,
            fingerprint=hello.fingerprint,
            block_bytes=hello.block_bytes,
            owner=hello.worker_id,
            on_arena=None if isinstance(memory, HostBlocks) else PinnedArena(),
        )
    except Unavailable as error:
        log.error("the store at %s is not used: %s", config.store, error)
        return None
    hello.has_store = True
    return StoreSide(client, engine, memory, metrics, block_size=hello.block_size, num_blocks=hello.num_blocks)


def _make_server(config: WorkerConfig) -> tuple[grpc.aio.Server, int]:
    """A gRPC server that is not started, and its port."""
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
            ("grpc.http2.min_ping_interval_without_data_ms", 1000),
            ("grpc.so_reuseport", 0),
            *CHANNEL_OPTIONS,
        ]
    )
    try:
        return server, config.control.listen(server, f"{config.host}:{config.port}")
    except RuntimeError as error:
        raise ConfigError(f"{config.host}:{config.port} cannot be listened on; choose another --port") from error


def _make_hello(config: WorkerConfig, built: Built, address: str, admin_address: str) -> pb.WorkerHello:
    limits = built.engine.config
    return pb.WorkerHello(
        protocol_version=PROTOCOL_VERSION,
        worker_id=config.worker_id,
        incarnation=secrets.randbits(63),
        role=config.role.to_proto(),
        model=config.model.name,
        fingerprint=built.fingerprint,
        block_size=built.geometry.block_size,
        block_bytes=built.geometry.block_bytes,
        num_blocks=limits.num_blocks,
        max_model_len=limits.max_model_len,
        max_sequences=limits.max_sequences,
        address=address,
        admin_address=admin_address,
        host_id=host_id(),
        eos_token_ids=built.eos_token_ids,
        vocab_size=built.vocab_size,
    )


def _add_services(server: grpc.aio.Server, worker: Worker) -> health.aio.HealthServicer:  # type: ignore[name-defined]
    """The worker's own service, the standard health service, and reflection."""
    add_WorkerServicer_to_server(WorkerService(worker), server)
    healthy = health.aio.HealthServicer()  # type: ignore[attr-defined]  # chosen by Python version inside
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    reflection.enable_server_reflection((_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    return healthy


def _lease(config: WorkerConfig, hello: pb.WorkerHello) -> contextlib.AbstractAsyncContextManager[Lease | None]:
    if config.redis_url is None:
        return contextlib.nullcontext()
    endpoint = Endpoint(
        namespace=config.namespace,
        component="worker",
        endpoint_id=config.worker_id,
        address=hello.address,
        incarnation=hello.incarnation,
        role=config.role.value,
        admin_address=hello.admin_address,
    )
    return Lease(config.redis_url, endpoint)


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), reuse_port=False)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"{host}:{port} cannot be listened on ({reason}); choose another --admin-port") from error


def _end_process(watch: asyncio.Task[None]) -> None:
    """The engine has died, not we are ending: what is left ends as if told to, so that routers learn it at once."""
    if not watch.cancelled():
        signal.raise_signal(signal.SIGTERM)


async def _serve_admin(server: uvicorn.Server, listening: socket.socket) -> None:
    with contextlib.closing(listening):
        await server._serve([listening])  # `serve` would take over the process's signals


async def run(config: WorkerConfig, built: Built, ready: Callable[[pb.WorkerHello], None]) -> None:
    """Serve until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    pool = built.engine.runner.pool
    memory = block_memory(pool)
    scratch = memory.scratch(config.limits.link.probe_bytes)
    transport = open_transport(config.transport, memory, scratch, pool.device)
    async with running_worker(config, built, transport, scratch) as hello:
        where = (config.role.value, hello.address, hello.admin_address)
        log.info("worker %s (%s) serves on %s, admin on %s", hello.worker_id, *where)
        ready(hello)
        await stop.wait()
        log.info("worker %s is ending", hello.worker_id)
