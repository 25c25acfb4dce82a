"""A running `pdserve up` for benchmarks: started, ready, and stopped again."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HOST = "127.0.0.1"
# Two workers each, so that what differs is how they share the work.
TOPOLOGIES = {"mixed": ("--mixed", "2"), "disaggregated": ("--prefill", "1", "--decode", "1")}
_READY_S = 300.0
_STOP_S = 15.0


@dataclass(frozen=True, slots=True)
class Deployment:
    """`pid` is the supervisor's."""

    pid: int
    port: int

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"


@contextlib.contextmanager
def deployed(options: tuple[str, ...], log: Path) -> Iterator[Deployment]:
    """`pdserve up` with these options while entered. Raises SystemExit if it does not become ready."""
    with socket.create_server((HOST, 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "pdserve.cli", "up", "--host", HOST, "--port", str(port), *options]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline_s = time.monotonic() + _READY_S
        while not _ready(port):
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise SystemExit(f"the server did not become ready: see {log}")
            time.sleep(0.2)
        yield Deployment(process.pid, port)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/readyz", timeout=1) as response:
            return bool(response.status == 200)
    except OSError:
        return False
