"""The router process: joins fleet, dispatcher and HTTP, and ends in order.

first SIGTERM   not ready any more and nothing new is taken; what streams may finish within `drain_s`
second one, or SIGINT, or the end of `drain_s`   what still streams is aborted on all workers
then   HTTP closes, sessions close, which aborts on the workers whatever might be left
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import secrets
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from prometheus_client import CollectorRegistry

from kvstore.control_plane import ControlPlane, control_plane
from kvstore.errors import Unavailable
from kvstore.keys import BlockKey
from pdserve import vllm_names
from pdserve.discovery import Discovery, RedisDiscovery, StaticDiscovery
from pdserve.errors import ConfigError, Overloaded
from pdserve.launch.folders import cache_folder
from pdserve.models.config import load_config
from pdserve.models.source import resolve_model
from pdserve.tenants import TenantsFile
from pdserve.vllm_names import VllmNames
from router.account_metrics import AccountCollector
from router.admission import Mode
from router.admission_metrics import AdmissionCollector
from router.auto_balance import AutoBalance
from router.dispatch import RouterDispatcher
from router.explain import Explainer
from router.fleet import Fleet
from router.fleet_metrics import FleetCollector
from router.grammar_check import GrammarCheck
from router.http.access import Access
from router.http.app import make_app
from router.http.service import ServedModel, Service
from router.http.trust import Trust
from router.limits import RouterLimits
from router.metrics import RouterMetrics
from router.operations import Operations
from router.policy import POLICIES, Role
from router.records import Records
from router.slo import check_slo
from router.text.chat_template import ChatTemplate
from router.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from router.tracing import Tracing

log = logging.getLogger(__name__)

_BACKLOG = 2048
_ABORT_S = 1.0  # for streams that were aborted to tell their clients
_CLOSE_S = 2  # for connections to close


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Workers are found through `redis_url` or are those at `workers`; exactly one of the two is given."""

    model: Path
    host: str
    port: int
    redis_url: str | None
    workers: tuple[str, ...]
    namespace: str
    policy: str
    drain_s: float
    admission: str = Mode.SHADOW.value
    skip_handoffs: bool = False  # where a decode worker alone is predicted to cost less
    auto_balance: bool = False  # act on advice about roles
    admin_key_file: Path | None = None  # whoever has what is in it is an operator
    tenants_file: Path | None = None  # as `pdserve.tenants` has it; None lets everybody in
    tls_dir: Path | None = None  # as `kvstore.control_plane` has it
    decision_log: Path | None = None  # one JSON line a request is appended
    vllm_names: bool = True  # metrics under the names of vLLM too
    expect: tuple[str, ...] = ()  # roles that the deployment has: it is ready when each is there, or has not come
    reuse_port: bool = False  # other router processes listen on the same port, and the kernel spreads the connections
    own_port: int | None = None  # where this process alone listens too

    def __post_init__(self) -> None:
        if (self.redis_url is None) == (not self.workers):
            raise ConfigError("Say where the workers are: --redis URL, or --worker HOST:PORT once or more.")
        if self.policy not in POLICIES:
            raise ConfigError(f"No policy is named {self.policy}; there are {', '.join(POLICIES)}.")
        if self.admission not in {mode.value for mode in Mode}:
            raise ConfigError(f"--admission is one of {', '.join(mode.value for mode in Mode)}.")
        if not set(self.expect) <= {role.value for role in Role}:
            raise ConfigError(f"--expect is some of {', '.join(role.value for role in Role)}, with commas between.")
        if self.drain_s < 0:
            raise ConfigError("--drain-s cannot be negative.")

    def discovery(self) -> Discovery:
        if self.redis_url is not None:
            return RedisDiscovery(self.redis_url, namespace=self.namespace)
        return StaticDiscovery(self.workers, namespace=self.namespace)


def load_model(folder: Path) -> ServedModel:
    """Raises ConfigError."""
    config = load_config(folder)
    return ServedModel(
        name=folder.resolve().name,
        tokenizer=Tokenizer.from_folder(folder),
        chat_template=ChatTemplate.from_folder(folder),
        max_model_len=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        eos_token_ids=config.eos_token_ids,
        created_s=int(time.time()),
    )


def _records(log_file: Path | None) -> Records:
    """Raises ConfigError."""
    try:
        return Records(log_file=log_file)
    except OSError as error:
        raise ConfigError(f"The decision log {log_file} cannot be written ({error.strerror}).") from error


def _trust(key_file: Path | None) -> Trust:
    """Raises ConfigError."""
    if key_file is None:
        return Trust()
    try:
        key = key_file.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"The admin key cannot be read from {key_file} ({error.strerror}).") from error
    if not key:
        raise ConfigError(f"{key_file} has no admin key in it.")
    return Trust(key)


def _control(tls_dir: Path | None) -> ControlPlane:
    """Raises ConfigError."""
    try:
        return control_plane(tls_dir)
    except Unavailable as error:
        raise ConfigError(str(error)) from error


def _access(config: RouterConfig) -> Access:
    """Raises ConfigError."""
    tenants = TenantsFile(config.tenants_file, check_slo) if config.tenants_file is not None else None
    return Access(_trust(config.admin_key_file), tenants)


def tracing_of(model: str, router_id: str) -> Tracing | None:
    """If the environment names a place for spans; a router without the packages for it serves on without them."""
    places = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    if os.environ.get("OTEL_TRACES_EXPORTER") == "none" or not any(os.environ.get(place) for place in places):
        return None
    try:
        from router.tracing import Tracing
    except ImportError:
        log.warning("No spans are exported, though OTEL_* ask for them: install pdserve[otel].")
        return None
    return Tracing.from_environment(model, router_id)


class Router:
    """Everything of one router process but its sockets and signals. `start` and `close` run in the event loop."""

    def __init__(self, config: RouterConfig, model: ServedModel) -> None:
        limits = RouterLimits()
        router_id = secrets.token_hex(4)
        registry = CollectorRegistry()
        self.fleet = Fleet(
            config.discovery(),
            router_id,
            limits.fleet,
            model.vocab_size,
            _control(config.tls_dir),
            frozenset(map(Role, config.expect)),
        )
        self._records = _records(config.decision_log)
        self._grammars = GrammarCheck(config.model / "tokenizer.json", model.vocab_size, model.eos_token_ids)
        self.dispatcher = RouterDispatcher(
            self.fleet,
            POLICIES[config.policy],
            limits,
            self._records,
            Mode(config.admission),
            skips_handoffs=config.skip_handoffs,
        )
        self._balance = AutoBalance(self.fleet, self.dispatcher.account.demand, acts=config.auto_balance)
        registry.register(FleetCollector(self.fleet, self.dispatcher, self._balance))
        account = self.dispatcher.account
        self._tracing = tracing_of(model.name, router_id)
        if self._tracing is not None:
            account.on_close = self._tracing.ended
        registry.register(AccountCollector(account.goodput, account.predictor.errors))
        registry.register(AdmissionCollector(self.dispatcher.feeder))
        if config.vllm_names:
            registry.register(VllmNames(registry, vllm_names.ROUTER, model.name))
        self.app = make_app(
            Service(
                model=model,
                dispatcher=self.dispatcher,
                root_key=self._root_key,
                metrics=RouterMetrics(registry),
                topology=self._topology,
                check_grammar=self._grammars.check,
                routing=Explainer(self.fleet, self.dispatcher, self._balance),
                operations=Operations(self.fleet),
                access=_access(config),
            )
        )
        self._draining = False
        log.info("router=%s model=%s policy=%s", router_id, model.name, config.policy)

    def start(self) -> None:
        self.fleet.start(self.dispatcher)
        self._balance.start()

    async def drain(self, timeout_s: float, hurry: asyncio.Event) -> None:
        """Take nothing new and wait for what is active, until `timeout_s` or `hurry`; then abort it."""
        self._draining = True
        log.info("draining active_requests=%d", self.dispatcher.num_active)
        waits = [asyncio.create_task(self.dispatcher.drain(timeout_s)), asyncio.create_task(hurry.wait())]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        self.dispatcher.abort_all()

    async def close(self) -> None:
        await self._balance.close()
        await self.fleet.close()
        await self._grammars.close()
        self._records.close()
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)

    def _root_key(self, salt: bytes) -> BlockKey:
        if self._draining:
            raise Overloaded("The server is ending.")
        return self.fleet.root_key(salt)

    def _topology(self) -> dict[str, Any]:
        topology = self.fleet.topology()
        if self._draining:
            topology |= {"ready": False, "reason": "the router is ending"}
        return {**topology, "draining": self._draining}


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the router's: it drains before HTTP closes."""
        yield


def listen(host: str, port: int, *, reuse_port: bool = False) -> socket.socket:
    """Raises ConfigError."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=_BACKLOG, reuse_port=reuse_port)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"Port {port} on {host} cannot be listened on ({error}); choose another --port.") from error


async def run(config: RouterConfig) -> None:
    """Serve until a signal. Raises ConfigError."""
    with contextlib.ExitStack() as open_sockets:
        sockets = [open_sockets.enter_context(listen(config.host, config.port, reuse_port=config.reuse_port))]
        if config.own_port is not None:
            sockets.append(open_sockets.enter_context(listen(config.host, config.own_port)))
        config = replace(config, model=resolve_model(config.model, cache_folder()))
        router = Router(config, load_model(config.model))
        server = _Server(
            uvicorn.Config(
                router.app,
                http="httptools",
                lifespan="off",
                access_log=False,
                log_config=None,
                server_header=False,
                timeout_graceful_shutdown=_CLOSE_S,
            )
        )
        stop, hurry = asyncio.Event(), asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, _on_signal, number, stop, hurry)
        gc.collect()
        gc.freeze()  # what is there by now stays: full collections, which everybody waits for, need not look at it
        # A request leaves some 70 objects for its record: at Python's 700 the young ones cost 4 % of its CPU time.
        gc.set_threshold(10_000)
        router.start()
        serving = asyncio.create_task(server.serve(sockets=sockets), name="http")
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
            if stop.is_set():
                await router.drain(config.drain_s, hurry)
        finally:
            stopping.cancel()
            server.should_exit = True
            await asyncio.wait([serving], timeout=_ABORT_S + _CLOSE_S)
            await router.close()
        log.info("ended")


def _on_signal(number: signal.Signals, stop: asyncio.Event, hurry: asyncio.Event) -> None:
    if number == signal.SIGINT or stop.is_set():
        hurry.set()
    stop.set()
