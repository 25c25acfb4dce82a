"""`pdserve up`: start everything in order, keep it running, end it without a trace.

    port free? ──> prepare (model, weights, kernels) ──┐
                   redis ──────────────────────────────┴──> workers and router ──> ready ──> keep running ──> stop

A failure before ready ends everything with the reason; after it, what dies is started again. The kernel ends each child
with us, even when we are killed (pdserve.launch.child).
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from pdserve.discovery import ping_redis
from pdserve.launch.announce import Progress, StartFailed, await_ready
from pdserve.launch.child import Child
from pdserve.launch.folders import RunFolder, runtime_folder
from pdserve.launch.http_front import check_port_free, example_command, first_model, get_json, local_url
from pdserve.launch.plan import (
    UpOptions,
    prepare_command,
    router_command,
    store_command,
    store_socket,
    worker_commands,
)
from pdserve.launch.redis_server import await_answer, server_binary, server_command, server_url
from pdserve.launch.service import Service
from pdserve.launch.steps import Steps

PREPARE_TIMEOUT_S = 3600.0  # a first start downloads and converts the model
REDIS_TIMEOUT_S = 10.0
STORE_TIMEOUT_S = 60.0
WORKER_TIMEOUT_S = 900.0  # the first start on a GPU compiles kernels, for minutes
ROUTER_TIMEOUT_S = WORKER_TIMEOUT_S  # it waits for them
STOP_GRACE_S = 3.0
_REDIS_GRACE_S = 0.5
_POLL_S = 0.1
_TRIM_INTERVAL_S = 30.0
MAX_LOG_BYTES = 8 << 20


async def up(options: UpOptions, steps: Steps) -> int:
    """Serve until SIGINT, SIGTERM or SIGHUP; returns the exit code: 0 after a stop, 1 if something could not start.

    Raises:
        ConfigError: something this machine lacks; nothing was started.
    """
    started_s = time.monotonic()
    check_port_free(options.host, options.port)
    if options.redis_url is None:
        redis_binary = server_binary()
    else:
        redis_binary = None
        await ping_redis(options.redis_url)
    stop = _stop_event()
    with RunFolder(runtime_folder()) as folder:
        supervisor = Supervisor(options, redis_binary, steps, folder)
        try:
            return await supervisor.serve(started_s, stop)
        finally:
            await supervisor.stop()


class Supervisor:
    """Owns the services.

    Args:
        redis_binary: the server to embed; None where `options` name a running one.
        folder: takes sockets and logs.
    """

    def __init__(self, options: UpOptions, redis_binary: Path | None, steps: Steps, folder: Path) -> None:
        self._options = options
        self._url = local_url(options.host, options.port)
        self._redis_url = options.redis_url or server_url(folder)
        self._redis_binary = redis_binary
        self._steps = steps
        self._folder = folder
        self._store_socket = store_socket(options, folder)
        self._redis: list[Service] = []
        self._services: list[Service] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def serve(self, started_s: float, stop: asyncio.Event) -> int:
        """Start, say so, and keep running until `stop`. Returns the exit code."""
        try:
            with self._steps:
                await _unless(stop, self._start_all())
        except* StartFailed:
            return_code = 1
        else:
            return_code = 0
        if return_code == 0 and not stop.is_set():
            self._say_ready(time.monotonic() - started_s)
            for service in (*self._redis, *self._services):
                self._tasks.append(asyncio.create_task(service.keep_running(self._say), name=f"keep {service.name}"))
            self._tasks.append(asyncio.create_task(trim_logs(self._folder), name="trim logs"))
            await stop.wait()
        if stop.is_set():
            self._steps.say("stopping")
        return return_code

    async def stop(self) -> None:
        """End every process, Redis last so that workers can take back their leases. Within `STOP_GRACE_S` and a bit."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(service.stop(STOP_GRACE_S) for service in self._services))
        await asyncio.gather(*(service.stop(_REDIS_GRACE_S) for service in self._redis))

    async def _start_all(self) -> None:
        """Raises an ExceptionGroup of StartFailed, whose reasons have been shown; the rest is not waited for."""
        prepare = Service(prepare_command(self._options), self._folder, _announced, PREPARE_TIMEOUT_S)
        self._services.append(prepare)
        async with asyncio.TaskGroup() as group:
            prepared = group.create_task(self._start(prepare, "model", "preparing", _prepared_text))
            if self._redis_binary is not None:
                command = server_command(self._redis_binary, self._folder)
                redis = Service(command, self._folder, await_answer, REDIS_TIMEOUT_S)
                self._redis.append(redis)
                group.create_task(self._start(redis, "redis", "starting", lambda _: "embedded, in memory"))
            if self._store_socket is not None:
                command = store_command(self._options, self._store_socket, self._redis_url)
                store = Service(command, self._folder, _announced, STORE_TIMEOUT_S)
                self._services.append(store)
                group.create_task(self._start(store, "store", "starting", self._store_text))
        self._services.remove(prepare)
        await prepare.stop(STOP_GRACE_S)
        await self._start_serving(Path(str(prepared.result()["model"])))

    async def _start_serving(self, model: Path) -> None:
        """Workers and router at once: the router becomes ready when it has found workers."""
        async with asyncio.TaskGroup() as group:
            for command in worker_commands(self._options, model, self._redis_url, self._store_socket):
                worker = Service(command, self._folder, _announced, WORKER_TIMEOUT_S)
                self._services.append(worker)
                group.create_task(self._start(worker, worker.name, "starting", _worker_text))
            command = router_command(self._options, model, self._redis_url)
            router = Service(command, self._folder, self._router_ready, ROUTER_TIMEOUT_S)
            self._services.append(router)
            group.create_task(self._start(router, router.name, "starting", lambda _: f"on {self._url}"))

    async def _start(
        self, service: Service, step: str, text: str, result: Callable[[dict[str, Any]], str]
    ) -> dict[str, Any]:
        """What the service says of itself when it is ready. Raises StartFailed after it has shown the reason."""
        self._steps.begin(step, text)
        try:
            values = await service.start(lambda text, fraction: self._steps.progress(step, text, fraction))
        except StartFailed as error:
            self._steps.failed(step, str(error))
            if error.tail:
                self._steps.say(f"the end of its log:\n{error.tail}", style="dim")
            raise
        self._steps.done(step, result(values))
        return values

    async def _router_ready(self, child: Child, progress: Progress) -> dict[str, Any]:
        """Until the router answers that it is ready; a server that is not there yet offers no event to wait for."""
        del child
        while True:
            try:
                await asyncio.to_thread(get_json, self._url, "/readyz")
                return {}
            except ValueError:
                progress("waiting for workers", None)
            except OSError:
                pass
            await asyncio.sleep(_POLL_S)

    def _store_text(self, values: dict[str, Any]) -> str:
        sizes = {"host": self._options.host_bytes, "disk": self._options.disk_bytes}
        tiers = ", ".join(f"{name} {size / 2**30:.3g} GiB" for name, size in sizes.items() if size)
        return f"{tiers}, socket {values.get('socket', '?')}"

    def _say_ready(self, took_s: float) -> None:
        self._steps.say(
            f"ready on {self._url} after {took_s:.1f} s; Ctrl-C ends it, logs are in {self._folder}", "bold"
        )
        try:
            self._steps.say(example_command(self._url, first_model(self._url)))
        except (OSError, ValueError) as error:
            self._steps.say(f"but {self._url}/v1/models cannot be read: {error}", "red")

    def _say(self, text: str) -> None:
        self._steps.say(f"{time.strftime('%H:%M:%S')} {text}", "yellow")


async def _announced(child: Child, progress: Progress) -> dict[str, Any]:
    assert child.ready_pipe is not None, "the command does not announce"
    return await await_ready(child.ready_pipe, progress)


def _prepared_text(values: dict[str, Any]) -> str:
    return f"{Path(str(values['model'])).name}, {values['kernels']} kernels"


def _worker_text(values: dict[str, Any]) -> str:
    return f"on {values.get('address', '?')}, admin {values.get('admin_address', '?')}"


async def _unless(stop: asyncio.Event, start: Coroutine[Any, Any, None]) -> None:
    """Run `start` to its end, or cancel it when `stop` comes first. Raises what `start` raises."""
    starting = asyncio.create_task(start)
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
    finally:
        for task in (starting, stopping):
            task.cancel()
        await asyncio.gather(starting, stopping, return_exceptions=True)


def _stop_event() -> asyncio.Event:
    """Set by the signals that ask us to end."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    return stop


async def trim_logs(folder: Path) -> None:
    """Keep the logs of children that run for months bounded. Runs until cancelled."""
    while True:
        await asyncio.sleep(_TRIM_INTERVAL_S)
        trim(folder, MAX_LOG_BYTES)


def trim(folder: Path, max_bytes: int) -> None:
    """Cut each log above `max_bytes` down to its last part. Writers append, so they go on at the new end."""
    for log in folder.glob("*.log"):
        if log.stat().st_size <= max_bytes:
            continue
        with log.open("rb") as file:
            file.seek(-max_bytes // 2, os.SEEK_END)
            kept = file.read()
        with log.open("r+b") as file:
            file.truncate(0)
            os.write(file.fileno(), kept)
