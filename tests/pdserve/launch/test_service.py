"""A service is ready or has failed, and one that dies is started again: at once, then ever later."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import textwrap
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from pdserve.launch.announce import Progress, StartFailed, await_ready
from pdserve.launch.child import Child, Command
from pdserve.launch.service import Service, restart_delay_s

ANNOUNCE = """
import os, signal, sys
def announce(line):
    os.write(int(sys.argv[2]), line.encode() + b"\\n")
"""


def ignore(text: str, fraction: float | None) -> None:
    pass


async def announced(child: Child, progress: Progress) -> dict[str, Any]:
    assert child.ready_pipe is not None
    return await await_ready(child.ready_pipe, progress)


def service(folder: Path, code: str, *, timeout_s: float = 20.0) -> Service:
    command = Command("thing", [sys.executable, "-c", ANNOUNCE + textwrap.dedent(code)], {}, announces=True)
    return Service(command, folder, announced, timeout_s)


@pytest.fixture
async def stopped() -> AsyncIterator[list[Service]]:
    """Services put in here have no process left after the test."""
    services: list[Service] = []
    yield services
    for one in services:
        await one.stop(grace_s=0.5)


def test_delays_grow_to_a_minute() -> None:
    assert [restart_delay_s(n) for n in range(7)] == [0, 5, 10, 20, 40, 60, 60]
    assert restart_delay_s(10**6) == 60


async def test_ready(tmp_path: Path, stopped: list[Service]) -> None:
    one = service(tmp_path, """announce('{"address": "h:1"}'); signal.pause()""")
    stopped.append(one)
    assert await one.start(ignore) == {"address": "h:1"}


async def test_an_announced_error_is_the_reason_even_if_the_process_ends_at_once(tmp_path: Path) -> None:
    one = service(tmp_path, """print("in the log"); announce('{"error": "No room."}'); sys.exit(1)""")
    with pytest.raises(StartFailed, match=r"No room\.") as raised:
        await one.start(ignore)
    assert raised.value.tail == "in the log"


async def test_a_process_that_crashes_early_shows_its_log(tmp_path: Path) -> None:
    one = service(tmp_path, "raise RuntimeError('what went wrong')")
    with pytest.raises(StartFailed) as raised:
        await one.start(ignore)
    assert "what went wrong" in raised.value.tail


async def test_a_process_that_is_never_ready_is_ended(tmp_path: Path) -> None:
    one = service(tmp_path, "print(os.getpid(), flush=True); signal.pause()", timeout_s=2.0)
    with pytest.raises(StartFailed, match="not ready within 2 s"):
        await one.start(ignore)
    assert not Path(f"/proc/{one.log.read_text().strip()}").exists()


async def test_a_dead_process_comes_back_at_once(tmp_path: Path, stopped: list[Service]) -> None:
    one = service(tmp_path, """print(os.getpid(), flush=True); announce('{"ready": true}'); signal.pause()""")
    stopped.append(one)
    await one.start(ignore)
    said: asyncio.Queue[str] = asyncio.Queue()
    keeper = asyncio.create_task(one.keep_running(said.put_nowait))
    os.kill(int(one.log.read_text()), signal.SIGKILL)
    started_s = time.monotonic()
    async with asyncio.timeout(20):
        assert await said.get() == "thing was killed by SIGKILL; starting it again"
        assert (await said.get()).startswith("thing is back")
    assert time.monotonic() - started_s < 5  # no delay the first time
    pids = one.log.read_text().split()
    assert len(pids) == 2
    keeper.cancel()
    await one.stop(grace_s=2.0)
    assert not Path(f"/proc/{pids[1]}").exists()


async def test_a_process_that_keeps_dying_waits_longer(
    tmp_path: Path, stopped: list[Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second life never becomes ready."""
    monkeypatch.setattr("pdserve.launch.service.FIRST_DELAY_S", 0.01)
    once = tmp_path / "once"
    one = service(
        tmp_path,
        f"""
        if os.path.exists({str(once)!r}):
            announce('{{"error": "Not again."}}')
        else:
            open({str(once)!r}, "w").close()
            announce('{{"ready": true}}')
        """,
    )
    stopped.append(one)
    await one.start(ignore)
    said: asyncio.Queue[str] = asyncio.Queue()
    keeper = asyncio.create_task(one.keep_running(said.put_nowait))
    async with asyncio.timeout(20):
        lines = [await said.get() for _ in range(5)]
    keeper.cancel()
    assert lines[0] == "thing ended with code 0; starting it again"
    assert lines[1].startswith("thing did not start: Not again.")
    assert lines[2] == "thing did not start; starting it again in 0 s"  # 0.01 s, rounded
    assert lines[4] == lines[2]
