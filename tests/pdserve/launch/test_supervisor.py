"""`up` starts everything or says why not, replaces what dies, and ends within 5 s leaving no process and no file."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from pdserve.launch.http_front import get_json
from pdserve.launch.supervisor import trim

ROOT = Path(__file__).resolve().parents[3]
FLEET = Path(__file__).with_name("fake_fleet.py")
MARK = "PDSERVE_TEST_MARK"


class Fleet:
    """A running `fake_fleet.py`; its run folder is made in `folder`, which also marks all its processes."""

    def __init__(self, folder: Path, behaviour: str) -> None:
        self.folder = folder
        self.port = free_port()
        self.process = subprocess.Popen(
            [sys.executable, str(FLEET), str(self.port), behaviour],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env={**os.environ, "XDG_RUNTIME_DIR": str(folder), MARK: str(folder), "PYTHONPATH": str(ROOT)},
        )
        self.seen = ""

    def read_until(self, pattern: str) -> re.Match[str]:
        """Its output up to a line with `pattern`; the test's own timeout is the deadline."""
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            self.seen += line
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"it ended without {pattern!r}:\n{self.seen}")

    def end(self, number: signal.Signals) -> float:
        """Seconds from the signal to its end."""
        started_s = time.monotonic()
        self.process.send_signal(number)
        rest, _ = self.process.communicate(timeout=20)
        self.seen += rest
        return time.monotonic() - started_s

    def processes(self) -> list[int]:
        """Living ones with our mark in their environment or (Redis overwrites it) our folder in the title."""
        marks = (("environ", f"{MARK}={self.folder}".encode()), ("cmdline", f"{self.folder}/".encode()))
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _carries(pid, marks)]

    def is_gone(self, timeout_s: float = 5.0) -> bool:
        deadline_s = time.monotonic() + timeout_s
        while self.processes() and time.monotonic() < deadline_s:
            time.sleep(0.02)
        return not self.processes()


def _carries(pid: int, marks: Sequence[tuple[str, bytes]]) -> bool:
    try:
        return any(mark in Path(f"/proc/{pid}/{file}").read_bytes() for file, mark in marks)
    except OSError:
        return False  # it ended meanwhile


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.fixture
def fleets() -> Iterator[list[Fleet]]:
    """What is put in here is killed after the test."""
    running: list[Fleet] = []
    yield running
    for fleet in running:
        fleet.process.kill()
        fleet.process.communicate(timeout=20)
        assert fleet.is_gone()


def started(fleets: list[Fleet], folder: Path, behaviour: str = "good") -> Fleet:
    fleet = Fleet(folder, behaviour)
    fleets.append(fleet)
    return fleet


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_it_serves_and_ends_without_a_trace(tmp_path: Path, fleets: list[Fleet], number: signal.Signals) -> None:
    fleet = started(fleets, tmp_path)
    fleet.read_until(r"ready on http://127\.0\.0\.1:\d+ after [\d.]+ s")
    command = fleet.read_until("^curl ")
    assert '"model": "tiny"' in command.string
    assert get_json(f"http://127.0.0.1:{fleet.port}", "/readyz")
    assert len(fleet.processes()) == 4  # supervisor, redis, worker, router
    assert fleet.end(number) < 5
    assert fleet.process.returncode == 0
    assert not fleet.processes()
    assert list(tmp_path.iterdir()) == []


def test_a_deaf_worker_is_killed_in_time(tmp_path: Path, fleets: list[Fleet]) -> None:
    fleet = started(fleets, tmp_path, "deaf")
    fleet.read_until("^curl ")
    assert fleet.end(signal.SIGINT) < 5
    assert not fleet.processes()


def test_ctrl_c_while_it_starts(tmp_path: Path, fleets: list[Fleet]) -> None:
    fleet = started(fleets, tmp_path)
    fleet.read_until("model")
    assert fleet.end(signal.SIGINT) < 5
    assert fleet.process.returncode == 0
    assert not fleet.processes()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_supervisor_takes_everything_along(tmp_path: Path, fleets: list[Fleet]) -> None:
    fleet = started(fleets, tmp_path)
    fleet.read_until("^curl ")
    fleet.end(signal.SIGKILL)
    assert fleet.is_gone()


def test_a_worker_that_cannot_start_ends_it_with_the_reason(tmp_path: Path, fleets: list[Fleet]) -> None:
    fleet = started(fleets, tmp_path, "fails")
    fleet.read_until(r"prefill-0 +The model is broken\.")
    fleet.read_until("its last words")
    fleet.process.wait(20)
    assert fleet.process.returncode == 1
    assert not fleet.processes()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("victim", ["prefill-0", "router", "redis"])
def test_what_dies_comes_back(tmp_path: Path, fleets: list[Fleet], victim: str) -> None:
    fleet = started(fleets, tmp_path)
    fleet.read_until("^curl ")
    before = set(fleet.processes())
    os.kill(pid_of(fleet, victim), signal.SIGKILL)
    fleet.read_until(f"{victim} was killed by SIGKILL; starting it again")
    fleet.read_until(f"{victim} is back")
    after = set(fleet.processes())
    assert (len(before), len(after), len(before & after)) == (4, 4, 3)
    assert get_json(f"http://127.0.0.1:{fleet.port}", "/readyz")


def pid_of(fleet: Fleet, name: str) -> int:
    sign = {"prefill-0": b"print('worker'", "router": b"HTTPServer", "redis": b"redis.sock"}[name]
    return next(pid for pid in fleet.processes() if sign in Path(f"/proc/{pid}/cmdline").read_bytes())


def refused(runtime: Path, *options: str) -> str:
    """What `pdserve up` says when it ends before it has made anything in its folder."""
    done = subprocess.run(
        [sys.executable, "-m", "pdserve.cli", "up", *options],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env={**os.environ, "XDG_RUNTIME_DIR": str(runtime)},
        check=False,
    )
    assert done.returncode == 1
    assert list(runtime.iterdir()) == []
    return done.stderr


def test_a_taken_port_is_named_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused(tmp_path, "--port", str(port))
    assert f"Port {port} on 127.0.0.1 is in use" in said
    assert "--port" in said


def test_a_redis_that_does_not_answer_is_named_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    said = refused(tmp_path, "--port", str(port), "--redis", "redis://127.0.0.1:1")
    assert "No Redis answers at redis://127.0.0.1:1" in said


def test_logs_stay_bounded(tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    with log.open("ab") as writer:
        writer.write(b"old\n" * 1000 + b"new\n")
        writer.flush()
        trim(tmp_path, max_bytes=400)
        writer.write(b"newer\n")
    assert log.stat().st_size <= 210
    assert log.read_bytes().endswith(b"new\nnewer\n")
