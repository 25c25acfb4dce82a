"""A child never outlives its parent, and nothing of its process group outlives its stop."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from pdserve.launch.child import Child, Command, describe_exit, log_tail

ROOT = Path(__file__).resolve().parents[3]


def python(code: str, *, announces: bool = False) -> Command:
    return Command("child", [sys.executable, "-c", textwrap.dedent(code)], {}, announces)


def wait_until_gone(pid: int, timeout_s: float = 10.0) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


async def line_in(log: Path, timeout_s: float = 20.0) -> str:
    """The first whole line of a child's log."""
    async with asyncio.timeout(timeout_s):
        while True:
            text = log.read_text()
            if "\n" in text:
                return text.splitlines()[0]
            await asyncio.sleep(0.02)


async def test_its_output_and_its_end_are_known(tmp_path: Path) -> None:
    child = await Child.start(python("print('hello'); raise SystemExit(3)"), tmp_path / "log")
    assert await child.wait() == "ended with code 3"
    assert child.log_tail() == "hello"
    await child.stop(grace_s=1.0)


async def test_stop_asks_first(tmp_path: Path) -> None:
    code = """
        import signal, sys
        signal.signal(signal.SIGTERM, lambda *_: (print("asked", flush=True), sys.exit(0)))
        print("up", flush=True)
        signal.pause()
    """
    child = await Child.start(python(code), tmp_path / "log")
    await line_in(child.log)
    await child.stop(grace_s=10.0)
    assert child.log_tail() == "up\nasked"


async def test_stop_kills_what_does_not_listen_and_its_children(tmp_path: Path) -> None:
    code = """
        import signal, subprocess, sys
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print(subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]).pid, flush=True)
        signal.pause()
    """
    child = await Child.start(python(code), tmp_path / "log")
    grandchild = int(await line_in(child.log))
    started_s = time.monotonic()
    await child.stop(grace_s=0.3)
    assert time.monotonic() - started_s < 5
    assert await child.wait() == "was killed by SIGKILL"
    assert wait_until_gone(grandchild)


async def test_the_group_of_a_child_that_died_goes_too(tmp_path: Path) -> None:
    code = """
        import subprocess, sys
        print(subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]).pid, flush=True)
    """
    child = await Child.start(python(code), tmp_path / "log")
    grandchild = int(await line_in(child.log))
    await child.wait()
    assert wait_until_gone(grandchild)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_parent_takes_its_child_along(tmp_path: Path, number: signal.Signals) -> None:
    parent = """
        import asyncio, sys
        from pathlib import Path
        from pdserve.launch.child import Child, Command
        async def main():
            arguments = [sys.executable, "-c", "import signal; signal.pause()"]
            child = await Child.start(Command("child", arguments, {}, False), Path(sys.argv[1]))
            print(child.pid, flush=True)
            await child.wait()
        asyncio.run(main())
    """
    arguments = [sys.executable, "-c", textwrap.dedent(parent), str(tmp_path / "log")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        os.kill(process.pid, number)
        process.wait(10)
    assert wait_until_gone(pid)


async def test_the_ready_pipe_belongs_to_the_child_alone(tmp_path: Path) -> None:
    code = """
        import os, sys
        assert sys.argv[1] == "--ready-fd"
        os.write(int(sys.argv[2]), b"up\\n")
    """
    child = await Child.start(python(code, announces=True), tmp_path / "log")
    assert child.ready_pipe is not None
    async with asyncio.timeout(20):
        assert await child.ready_pipe.read() == b"up\n"  # an end: no other process holds the other side
    await child.wait()
    child.close_ready_pipe()


async def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="No such file"):
        await Child.start(Command("child", ["/nowhere/program"], {}, True), tmp_path / "log")
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize(
    ("code", "text"), [(0, "ended with code 0"), (-9, "was killed by SIGKILL"), (-250, "was killed by signal 250")]
)
def test_exit_codes_in_words(code: int, text: str) -> None:
    assert describe_exit(code) == text


def test_the_tail_of_a_log_is_short(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert log_tail(log) == ""
    log.write_text("".join(f"line {number}\n" for number in range(10_000)))
    assert log_tail(log).splitlines()[-1] == "line 9999"
    assert len(log_tail(log).splitlines()) == 20
