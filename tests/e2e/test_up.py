"""`pdserve up` with the real model: one command serves, mends itself, and ends without a trace."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.api_client import ApiClient
from tests.support.stack import get_json, wait_for

pytestmark = pytest.mark.e2e

READY_S = 120.0  # on a busy machine; usually it takes a tenth of that
STOP_S = 5.0
MODEL = "SmolLM2-135M-Instruct"
QUESTION = [{"role": "user", "content": "What is gravity?"}]


@dataclass
class Up:
    """The supervisor's process, and where it puts its run folder."""

    process: subprocess.Popen[bytes]
    port: int
    runtime: Path
    output: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def client(self) -> ApiClient:
        return ApiClient(self.port, MODEL)

    def children(self) -> list[int]:
        task = Path(f"/proc/{self.process.pid}/task")
        return [int(pid) for thread in task.iterdir() for pid in (thread / "children").read_text().split()]

    def worker(self, worker_id: str) -> int:
        """The process id of a worker."""
        return next(pid for pid in self.children() if worker_id in command_line(pid))

    def linked(self) -> bool:
        """Prefill and decode are there and can exchange blocks."""
        try:
            topology = get_json(f"{self.url}/workers")
        except OSError:
            return False
        states = [worker["state"] for worker in topology["workers"]]
        links = [link["up"] for worker in topology["workers"] for link in worker["links"]]
        return states.count("ready") == 2 and any(links)

    def wait_linked(self) -> None:
        def linked_or_over() -> bool:
            assert self.process.poll() is None, self.output.read_text()
            return self.linked()

        wait_for(linked_or_over, READY_S, self.output.read_text)


@contextlib.contextmanager
def running_up(folder: Path) -> Iterator[Up]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    output = folder / "output"
    with output.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "pdserve.cli", "up", "--prefill", "1", "--decode", "1", "--port", str(port)],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "XDG_RUNTIME_DIR": str(folder)},
        )
    try:
        up = Up(process, port, folder, output)
        up.wait_linked()
        yield up
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def up(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with running_up(tmp_path_factory.mktemp("up")) as up:
        yield up


def command_line(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return []


def shared_memory(pid: int) -> set[str]:
    """Files in /dev/shm that the process has mapped."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line[line.index("/dev/shm/") :].removesuffix(" (deleted)") for line in lines if "/dev/shm/" in line}


def test_says_that_it_is_ready_and_shows_a_command_that_works(up: Up) -> None:
    wait_for(lambda: "curl" in up.output.read_text(), 10.0, up.output.read_text)
    said = up.output.read_text()
    assert f"ready on {up.url}" in said
    command = next(line for line in said.splitlines() if line.strip().startswith("curl"))
    answer = subprocess.run(["bash", "-ec", command], capture_output=True, text=True, timeout=60, check=True).stdout
    assert answer.endswith("data: [DONE]\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in answer.split("\n\n")[:-2]]
    assert "physics" in "".join(event["choices"][0]["delta"].get("content") or "" for event in events)


def test_audit(up: Up) -> None:
    assert up.client.chat(QUESTION).text
    audit = [sys.executable, "-m", "pdserve.cli", "kv", "audit", "--url", up.url]
    done = subprocess.run(audit, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "prefill-0" in done.stdout
    assert "decode-0" in done.stdout


@pytest.mark.parametrize("worker_id", ["prefill-0", "decode-0"])
def test_a_killed_worker_comes_back_and_serves(up: Up, worker_id: str) -> None:
    before = up.worker(worker_id)
    expected = up.client.chat(QUESTION).text
    os.kill(before, signal.SIGKILL)
    # Meanwhile the other one serves.
    assert up.client.chat(QUESTION).text == expected
    wait_for(lambda: f"{worker_id} is back" in up.output.read_text(), READY_S, up.output.read_text)
    up.wait_linked()
    assert up.worker(worker_id) != before
    assert up.client.chat(QUESTION).text == expected


def test_interrupt_ends_everything_within_5_s(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with running_up(tmp_path_factory.mktemp("up")) as up:
        children = up.children()
        assert len(children) == 5, "redis, store, router and two workers"
        shared = {path for pid in children for path in shared_memory(pid)}
        (folder,) = up.runtime.glob("pdserve-*")
        assert list(folder.glob("*.sock"))
        with up.client.stream({"messages": QUESTION, "max_tokens": 2000, "ignore_eos": True}) as stream:
            stream.read(3)
            up.process.send_signal(signal.SIGINT)
            began_s = time.monotonic()
            assert up.process.wait(2 * STOP_S) == 0
            assert time.monotonic() - began_s < STOP_S
        assert [pid for pid in children if command_line(pid)] == []
        assert not folder.exists()
        assert [path for path in shared if Path(path).exists()] == []
