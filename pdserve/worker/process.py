"""One worker process from start to end: build, listen, be found, serve, drain.

Start-up order: weights and pool, engine thread, transport, gRPC and admin ports, then the lease that lets routers find
us. Shutdown is the reverse: first nobody finds us, then sessions end (which gives every block back), then threads stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import mmap
import secrets
import signal
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import grpc.aio
import torch
import uvicorn
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvstore.errors import Unavailable
from kvstore.host import host_id
from kvstore.layout import BlockGeometry
from kvstore.pool import BlockPool
from kvstore.store.client import StoreClient
from kvstore.transfer.transport import Transport
from kvstore.transfer.ucx import UcxTransport
from pdserve import vllm_names
from pdserve.discovery import Endpoint, Lease
from pdserve.engine.config import EngineConfig
from pdserve.engine.engine import Engine
from pdserve.engine.runner import Runner
from pdserve.errors import ConfigError
from pdserve.grammars import Grammars
from pdserve.kernels import choose
from pdserve.launch.folders import cache_folder
from pdserve.models.config import load_config
from pdserve.models.decoder import Decoder
from pdserve.models.weights import TORCH_DTYPES, open_weights
from pdserve.protocol import PROTOCOL_VERSION
from pdserve.protocol import worker_pb2 as pb
from pdserve.protocol.worker_pb2_grpc import add_WorkerServicer_to_server
from pdserve.vllm_names import VllmNames
from pdserve.worker.admin import make_admin_app
from pdserve.worker.config import WorkerConfig
from pdserve.worker.engine_thread import EngineThread
from pdserve.worker.link_metrics import LinkCollector
from pdserve.worker.links import CHANNEL_OPTIONS, LinkTable
from pdserve.worker.memory import BlockMemory
from pdserve.worker.metrics import WorkerMetrics
from pdserve.worker.service import WorkerService
from pdserve.worker.store_side import StoreSide
from pdserve.worker.worker import Worker

log = logging.getLogger(__name__)

Progress = Callable[[str], None]

_MAX_MESSAGE_BYTES = 64 << 20
_STOP_S = 1.0
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_SERVICE = pb.DESCRIPTOR.services_by_name["Worker"].full_name


@dataclass(frozen=True, slots=True)
class Built:
    """The engine and what the rest of the worker needs to know of it."""

    engine: Engine
    geometry: BlockGeometry
    fingerprint: bytes
    eos_token_ids: tuple[int, ...]
    vocab_size: int


def build_engine(config: WorkerConfig, progress: Progress) -> Built:
    """Load the model and make the pool. Raises ConfigError with one sentence that says what to do."""
    torch.set_num_threads(config.threads)
    _keep_freed_memory()
    model = load_config(config.model)
    progress("loading weights")
    weights = open_weights(config.model, model, config.dtype, cache_folder(), config.weights)
    kernels = choose(config.kernels, model.head_dim, model.num_heads // model.num_kv_heads)
    geometry = BlockGeometry(config.block_size, model.num_layers, model.num_kv_heads, model.head_dim, config.dtype)
    num_blocks = config.kv_bytes // geometry.block_bytes
    if num_blocks < 1:
        raise ConfigError(f"--kv-bytes {config.kv_bytes} holds no block of {geometry.block_bytes} bytes")
    max_model_len = config.max_model_len or min(model.max_position_embeddings, num_blocks * config.block_size)
    engine_config = EngineConfig(
        num_blocks=num_blocks,
        block_size=config.block_size,
        max_batched_tokens=config.max_batched_tokens,
        max_sequences=config.max_sequences,
        max_model_len=max_model_len,
        speculate_tokens=config.speculate_tokens,
        handoff_s=config.limits.handoff_s,
    )
    decoder = Decoder(model, weights, kernels, max_model_len)
    pool = make_pool(num_blocks, geometry)
    engine = Engine(engine_config, BlockPool(num_blocks, config.block_size), Runner(decoder, pool))
    progress("warming up")
    engine.warm_up()
    return Built(engine, geometry, geometry.fingerprint(decoder.kv_identity), model.eos_token_ids, model.vocab_size)


def _keep_freed_memory() -> None:
    """Have malloc keep what a step frees: pages mapped anew cost a prefill step a tenth (docs/results.md)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def make_pool(num_blocks: int, geometry: BlockGeometry) -> torch.Tensor:
    """The KV pool's memory, `[num_blocks, kv_heads, layers, 2, block_size, head_dim]`.

    Zeroed, because a kernel may read (and then mask) what lies behind a context's end; the system does it page by page
    as blocks are first used. Huge pages make decode attention a fifth faster (docs/results.md). Prompts can be read
    from KV, so it stays out of core dumps.
    """
    memory = mmap.mmap(-1, num_blocks * geometry.block_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    memory.madvise(mmap.MADV_DONTDUMP)
    return torch.frombuffer(memory, dtype=TORCH_DTYPES[geometry.dtype]).view(num_blocks, *geometry.shape)


@contextlib.asynccontextmanager
async def running_worker(config: WorkerConfig, built: Built, transport: Transport) -> AsyncIterator[pb.WorkerHello]:
    """A worker that serves while entered; yields what it tells routers about itself. Closes the transport at the end.

    Raises:
        ConfigError: a port is taken.
    """
    admin_socket = _listen(config.host, config.admin_port)
    server, port = _make_server(config)
    hello = _make_hello(config, built, f"{config.host}:{port}", f"{config.host}:{admin_socket.getsockname()[1]}")
    loop = asyncio.get_running_loop()
    engine = EngineThread(built.engine, loop)
    links = LinkTable(hello, transport, config.limits.link, config.control)
    memory, metrics = BlockMemory(built.engine.runner.pool), WorkerMetrics(config.role.value)
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
            config.store, fingerprint=hello.fingerprint, block_bytes=hello.block_bytes, owner=hello.worker_id
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
    async with running_worker(config, built, UcxTransport()) as hello:
        where = (config.role.value, hello.address, hello.admin_address)
        log.info("worker %s (%s) serves on %s, admin on %s", hello.worker_id, *where)
        ready(hello)
        await stop.wait()
        log.info("worker %s is ending", hello.worker_id)
