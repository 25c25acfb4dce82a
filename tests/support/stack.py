"""A real deployment for end-to-end tests: worker and router processes as `pdserve up` starts them, without its supervisor.

Nothing restarts what a test kills, so what the survivors do is their own doing.
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
from typing import Any

READY_S = 90.0
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "UCX_WARN_UNUSED_ENV_VARS": "n"}


@dataclass
class WorkerProcess:
    worker_id: str
    process: subprocess.Popen[bytes]
    address: str
    admin_address: str

    def ledger(self) -> dict[str, Any]:
        return get_json(f"http://{self.admin_address}/ledger")

    def send_signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


@dataclass
class Stack:
    """Use as a context manager. Worker ids are `role-number`."""

    model: Path
    log_dir: Path
    roles: Mapping[str, int]  # for example {"prefill": 1, "decode": 1}
    worker_options: tuple[str, ...] = ("--dtype", "float32")
    router_options: tuple[str, ...] = ()
    workers: dict[str, WorkerProcess] = field(default_factory=dict)
    router: subprocess.Popen[bytes] | None = None
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Stack:
        try:
            started = [
                self._start_worker(role, f"{role}-{number}")
                for role, count in self.roles.items()
                for number in range(count)
            ]
            for worker_id, process, pipe in started:
                ready = self._await_ready(worker_id, pipe)
                self.workers[worker_id] = WorkerProcess(worker_id, process, ready["address"], ready["admin_address"])
            self._start_router()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        processes = [worker.process for worker in self.workers.values()] + ([self.router] if self.router else [])
        for process in processes:
            process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _spawn(self, name: str, arguments: list[str], pass_fds: tuple[int, ...] = ()) -> subprocess.Popen[bytes]:
        with (self.log_dir / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=pass_fds,
                env={**os.environ, **_ENVIRONMENT},
            )

    def _start_worker(self, role: str, worker_id: str) -> tuple[str, subprocess.Popen[bytes], int]:
        read_fd, write_fd = os.pipe()
        arguments = ["pdserve.worker", "--role", role, "--worker-id", worker_id, "--model", str(self.model)]
        arguments += [*self.worker_options, "--ready-fd", str(write_fd)]
        process = self._spawn(worker_id, arguments, pass_fds=(write_fd,))
        os.close(write_fd)
        return worker_id, process, read_fd

    def _await_ready(self, worker_id: str, pipe: int) -> dict[str, str]:
        with os.fdopen(pipe) as lines:
            for line in lines:
                value: dict[str, str] = json.loads(line)
                if "error" in value:
                    raise RuntimeError(f"{worker_id}: {value['error']}")
                if "progress" not in value:
                    return value
        raise RuntimeError(f"{worker_id} ended before it was ready:\n{self.log(worker_id)}")

    def _start_router(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        arguments = ["router", "--port", str(self.port), "--model", str(self.model), *self.router_options]
        for worker in self.workers.values():
            arguments += ["--worker", worker.address]
        self.router = self._spawn("router", arguments)
        wait_for(self.ready, READY_S, lambda: f"the router is not ready:\n{self.log('router')}")

    def ready(self) -> bool:
        try:
            return bool(get_json(f"{self.url}/readyz"))
        except OSError:
            return False

    def log(self, name: str) -> str:
        return (self.log_dir / f"{name}.log").read_text(errors="replace")[-4000:]

    def pools_idle(self) -> bool:
        """Every living worker's ledger has only free and cached blocks."""
        living = [worker for worker in self.workers.values() if worker.process.poll() is None]
        return all(ledger["sums"] and ledger["idle"] for ledger in (worker.ledger() for worker in living))

    def assert_pools_whole(self, within_s: float = 5.0) -> None:
        wait_for(
            self.pools_idle, within_s, lambda: str([w.ledger() for w in self.workers.values() if w.process.poll() is None])
        )


def get_json(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url, timeout=5) as response:
        value: dict[str, Any] = json.load(response)
        return value


def wait_for(condition: Callable[[], bool], within_s: float, describe: Callable[[], str]) -> None:
    """Poll until the condition holds; AssertionError with what is the case instead."""
    deadline_s = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise AssertionError(f"not within {within_s} s: {describe()}")
        time.sleep(0.02)
