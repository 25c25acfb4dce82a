"""A real deployment for end-to-end tests: processes as `pdserve up` starts them, without its supervisor.

Nothing restarts what a test kills, so what the survivors do is their own doing; `revive` is for the next test.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tests.support.api_client import ApiClient
from tests.support.forked_worker import ForkedWorker

READY_S = 90.0
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "UCX_WARN_UNUSED_ENV_VARS": "n"}


@dataclass(slots=True)
class WorkerProcess:
    """Addresses are those of its first start, which it keeps when it is revived."""

    worker_id: str
    process: subprocess.Popen[bytes] | ForkedWorker
    address: str = ""
    admin_address: str = ""

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def ledger(self) -> dict[str, Any]:
        return get_json(f"http://{self.admin_address}/ledger")

    def blocks(self, state: str) -> int:
        """Blocks in one of the ledger's states."""
        return int(self.ledger()["by_state"][state])

    def holds(self, request_id: str) -> bool:
        """Whether it has blocks of any attempt at this request."""
        return any(hold["owner"].startswith(f"{request_id}#") for hold in self.ledger()["holds"])

    def metric(self, name: str, **labels: str) -> float:
        return metric(f"http://{self.admin_address}/metrics", name, **labels)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)


@dataclass(slots=True)
class StoreProcess:
    process: subprocess.Popen[bytes]
    admin_address: str

    def metric(self, name: str, **labels: str) -> float:
        return metric(f"http://{self.admin_address}/metrics", name, **labels)


@dataclass
class Stack:
    """Use as a context manager. Worker ids are `role-number`."""

    model: Path
    log_dir: Path
    roles: Mapping[str, int]  # for example {"prefill": 1, "decode": 1}
    worker_options: tuple[str, ...] = ("--dtype", "float32")
    store_options: tuple[str, ...] | None = None  # of the store node that all workers use; None: there is none
    router_options: tuple[str, ...] = ()
    admin_key: str | None = None  # of the router, if one is among its options
    fresh: bool = False  # workers start as they do for a user, with this process's environment, not by a fork
    workers: dict[str, WorkerProcess] = field(default_factory=dict)
    store: StoreProcess | None = None
    router: subprocess.Popen[bytes] | None = None
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def client(self) -> ApiClient:
        return ApiClient(self.port, self.model.name)

    @property
    def living(self) -> list[WorkerProcess]:
        return [worker for worker in self.workers.values() if worker.alive]

    def with_role(self, role: str) -> list[WorkerProcess]:
        return [worker for worker in self.workers.values() if worker.worker_id.startswith(f"{role}-")]

    def __enter__(self) -> Stack:
        try:
            if self.store_options is not None:
                self.start_store()
            self._start_workers([f"{role}-{number}" for role, count in self.roles.items() for number in range(count)])
            with socket.create_server(("127.0.0.1", 0)) as probe:
                self.port = probe.getsockname()[1]
            self.start_router()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        processes: list[subprocess.Popen[bytes] | ForkedWorker] = [worker.process for worker in self.workers.values()]
        processes += [self.router] if self.router else []
        processes += [self.store.process] if self.store else []
        for process in processes:
            process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def revive(self) -> None:
        """Start again what is dead, under its old address, and wait until all is as it was at first."""
        self._start_workers([worker.worker_id for worker in self.workers.values() if not worker.alive])
        if self.router is None or self.router.poll() is not None:
            self.start_router()
        else:
            self._await_links()

    @property
    def _store_socket(self) -> Path:
        return self.log_dir / "store.sock"

    def start_store(self) -> None:
        read_fd, write_fd = os.pipe()
        arguments = ["kvstore.store", "--socket", str(self._store_socket), *(self.store_options or ())]
        process = self._spawn("store", [*arguments, "--ready-fd", str(write_fd)], pass_fds=(write_fd,))
        os.close(write_fd)
        self.store = StoreProcess(process, self._await_ready("store", read_fd)["admin_address"])

    def end_store(self, number: signal.Signals = signal.SIGTERM) -> None:
        assert self.store is not None
        self.store.process.send_signal(number)
        self.store.process.wait(20)

    def end_workers(self) -> None:
        """In order, as an operator would; `revive` brings them back."""
        for worker in self.living:
            worker.process.terminate()
        for worker in self.workers.values():
            worker.process.wait(20)

    def start_router(self) -> None:
        arguments = ["router", "--port", str(self.port), "--model", str(self.model)]
        for worker in self.workers.values():
            arguments += ["--worker", worker.address]
        arguments += self.router_options
        self.router = self._spawn("router", arguments)
        self._await_links()

    # --- looking at it -----------------------------------------------------------------------------------------------

    def holder(self, request_id: str, role: str) -> WorkerProcess:
        """The worker of this role that runs the request."""
        found: list[WorkerProcess] = []

        def look() -> bool:
            found[:] = [worker for worker in self.with_role(role) if worker.alive and worker.holds(request_id)]
            return bool(found)

        wait_for(look, 10.0, lambda: f"no {role} worker runs {request_id}")
        return found[0]

    def events(self, event: str) -> float:
        """The router's count of one kind of retry."""
        return metric(f"{self.url}/metrics", "pdserve_router_events_total", event=event)

    def queued(self) -> float:
        """Requests that wait in the router for their turn."""
        return metric(f"{self.url}/metrics", "pdserve_queue_requests")

    def log(self, name: str) -> str:
        return (self.log_dir / f"{name}.log").read_text(errors="replace")[-4000:]

    def assert_pools_whole(self, within_s: float = 5.0) -> None:
        """Every living worker's ledger comes to hold only free and cached blocks."""

        def whole() -> bool:
            return all(ledger["sums"] and ledger["idle"] for ledger in self._ledgers())

        wait_for(whole, within_s, lambda: str([ledger for ledger in self._ledgers() if not ledger["idle"]]))

    def _ledgers(self) -> list[dict[str, Any]]:
        return [worker.ledger() for worker in self.living]

    def _linked(self) -> bool:
        """The router is ready, has every worker, and every prefill worker is linked to every decode worker."""
        try:
            headers = {"x-pdserve-admin-key": self.admin_key} if self.admin_key else {}
            topology = get_json(f"{self.url}/workers", headers)
        except OSError:
            return False
        ready = [worker for worker in topology["workers"] if worker["state"] == "ready"]
        links = [link for worker in ready for link in worker["links"] if link["up"]]
        pairs = len(self.with_role("prefill")) * len(self.with_role("decode"))
        return bool(topology["ready"]) and len(ready) == len(self.workers) and len(links) == pairs

    def _await_links(self) -> None:
        wait_for(self._linked, READY_S, lambda: f"the router is not ready:\n{self.log('router')}")

    # --- starting ----------------------------------------------------------------------------------------------------

    def _spawn(self, name: str, arguments: list[str], pass_fds: tuple[int, ...] = ()) -> subprocess.Popen[bytes]:
        with (self.log_dir / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=pass_fds,
                env={**os.environ, **_ENVIRONMENT},
            )

    def _start_workers(self, worker_ids: list[str]) -> None:
        pipes = [self._start_worker(worker_id) for worker_id in worker_ids]
        for worker_id, pipe in zip(worker_ids, pipes, strict=True):
            ready = self._await_ready(worker_id, pipe)
            worker = self.workers[worker_id]
            worker.address, worker.admin_address = ready["address"], ready["admin_address"]

    def _start_worker(self, worker_id: str) -> int:
        """Returns the end to read of its ready pipe."""
        before = self.workers.get(worker_id)
        role = worker_id.partition("-")[0]
        arguments = ["--role", role, "--worker-id", worker_id, "--model", str(self.model)]
        if before is not None:
            arguments += ["--port", before.address.rpartition(":")[2]]
        if self.store_options is not None:
            arguments += ["--store", str(self._store_socket)]
        arguments += self.worker_options
        if not self.fresh:
            forked = ForkedWorker(arguments, self.log_dir / f"{worker_id}.log")
            self.workers[worker_id] = WorkerProcess(worker_id, forked)
            return forked.ready_fd
        read_fd, write_fd = os.pipe()
        arguments = ["pdserve.worker", *arguments, "--ready-fd", str(write_fd)]
        process = self._spawn(worker_id, arguments, pass_fds=(write_fd,))
        os.close(write_fd)
        self.workers[worker_id] = WorkerProcess(worker_id, process)
        return read_fd

    def _await_ready(self, worker_id: str, pipe: int) -> dict[str, str]:
        with os.fdopen(pipe) as lines:
            for line in lines:
                value: dict[str, str] = json.loads(line)
                if "error" in value:
                    raise RuntimeError(f"{worker_id}: {value['error']}")
                if "progress" not in value:
                    return value
        raise RuntimeError(f"{worker_id} ended before it was ready:\n{self.log(worker_id)}")


def get_json(url: str, headers: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:
    with urllib.request.urlopen(urllib.request.Request(url, headers=dict(headers)), timeout=5) as response:
        value: dict[str, Any] = json.load(response)
        return value


def post_json(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as response:
        value: dict[str, Any] = json.load(response)
        return value


def scrape(url: str) -> list[Sample]:
    """Raises ValueError if Prometheus would not take the page."""
    with urllib.request.urlopen(url, timeout=5) as response:
        page = response.read().decode()
    return [sample for family in text_string_to_metric_families(page) for sample in family.samples]


def metric(url: str, name: str, **labels: str) -> float:
    """The sum of the samples with this name and these labels; 0 where there is none."""
    return sum(
        sample.value for sample in scrape(url) if sample.name == name and labels.items() <= sample.labels.items()
    )


def wait_for(condition: Callable[[], bool], within_s: float, describe: Callable[[], str]) -> None:
    """Poll until the condition holds; AssertionError with what is the case instead."""
    deadline_s = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise AssertionError(f"not within {within_s} s: {describe()}")
        time.sleep(0.01)
