"""A child process that cannot outlive its parent: own process group, killed by the kernel when the parent dies."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pdserve.launch.announce import MAX_LINE_BYTES

LOG_TAIL_LINES = 20
_TAIL_BYTES = 16 * 1024
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Command:
    """What to run. With `announces`, `--ready-fd N` is appended: the other end of that pipe is `Child.ready_pipe`."""

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str]  # on top of our own
    announces: bool


class Child:
    """One running process. `stop` leaves nothing of its process group."""

    def __init__(self, command: Command, process: asyncio.subprocess.Process, log: Path) -> None:
        self.command = command
        self.pid = process.pid
        self.log = log
        self.ready_pipe: asyncio.StreamReader | None = None
        self._transport: asyncio.ReadTransport | None = None
        self._process = process
        self._group_ended = False

    @classmethod
    async def start(cls, command: Command, log: Path) -> Child:
        """Start it with its output appended to `log`. Raises OSError if it cannot be executed.

        To be called from the main thread: the kernel ties the child's life to the thread that started it.
        """
        reading, writing = os.pipe() if command.announces else (None, None)
        arguments = [*command.arguments, *(("--ready-fd", str(writing)) if writing is not None else ())]
        try:
            with log.open("ab") as output:
                process = await asyncio.create_subprocess_exec(
                    *arguments,
                    env={**os.environ, **command.environment},
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=() if writing is None else (writing,),
                    start_new_session=True,
                    preexec_fn=_die_with(os.getpid()),
                )
        except BaseException:
            if reading is not None:
                os.close(reading)
            raise
        finally:
            if writing is not None:
                os.close(writing)
        child = cls(command, process, log)
        if reading is not None:
            await child._open_ready_pipe(reading)
        return child

    async def _open_ready_pipe(self, fd: int) -> None:
        self.ready_pipe = asyncio.StreamReader(limit=MAX_LINE_BYTES)
        self._transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(self.ready_pipe),  # type: ignore[arg-type]
            os.fdopen(fd, "rb", buffering=0),
        )

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    async def wait(self) -> str:
        """Until it has ended; says how."""
        code = await self._process.wait()
        self._kill_group()
        return describe_exit(code)

    def close_ready_pipe(self) -> None:
        if self._transport is not None:
            self._transport.close()

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, then SIGKILL after `grace_s`; returns when nothing of its group runs. Idempotent."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self._process.wait()
        self._kill_group()
        await self.wait()

    def _kill_group(self) -> None:
        """What a child started itself (a compiler, say) is in its group and goes with it.

        Once only: later the number may name a group that is not ours.
        """
        if self._group_ended:
            return
        self._group_ended = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def log_tail(self) -> str:
        return log_tail(self.log)


def log_tail(log: Path) -> str:
    """The last lines of a log, for a person; empty where there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-LOG_TAIL_LINES:])


def describe_exit(code: int) -> str:
    """`code` as `Process.returncode` has it: negative for a signal."""
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def _die_with(parent_pid: int) -> Callable[[], None]:
    """Runs in the child between fork and exec. Signals that the parent handles are the child's own again after exec."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl  # looked up before the fork

    def arrange() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent_pid:  # the parent died before the call
            os._exit(1)

    return arrange
