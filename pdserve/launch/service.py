"""A service: one command that is kept running.

    start() ──> STARTING ── ready ──> RUNNING ── ends ──> WAITING (backoff) ──> STARTING ...
                   └── the first time: StartFailed

`keep_running` goes round until it is cancelled; `stop` ends the process in every state.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from pdserve.launch.announce import Progress, StartFailed
from pdserve.launch.child import Child, Command

FIRST_DELAY_S = 5.0
MAX_DELAY_S = 60.0
# A process that was ready for this long starts with a clean record.
STABLE_AFTER_S = 60.0
_LAST_WORDS_S = 0.5

AwaitReady = Callable[[Child, Progress], Awaitable[dict[str, Any]]]
Say = Callable[[str], None]


def restart_delay_s(recent_failures: int) -> float:
    """Seconds before the next start: none the first time, then 5, 10, 20, 40, 60, 60, ..."""
    if recent_failures == 0:
        return 0.0
    return min(MAX_DELAY_S, FIRST_DELAY_S * 2.0 ** min(recent_failures - 1, 10))


class Service:
    """
    Args:
        command: what to run; the same at each start.
        folder: where its log goes.
        await_ready: returns what the process says of itself, or raises StartFailed.
        ready_timeout_s: longest time from start to ready.
    """

    def __init__(self, command: Command, folder: Path, await_ready: AwaitReady, ready_timeout_s: float) -> None:
        self.name = command.name
        self.log = folder / f"{command.name}.log"
        self._command = command
        self._await_ready = await_ready
        self._ready_timeout_s = ready_timeout_s
        self._child: Child | None = None
        self._ready_at_s = 0.0

    async def start(self, progress: Progress) -> dict[str, Any]:
        """Run it until it is ready; returns what it says of itself.

        Raises:
            StartFailed: it is not ready; nothing of it runs any more.
        """
        try:
            child = self._child = await Child.start(self._command, self.log)
        except OSError as error:
            raise StartFailed(f"{self._command.arguments[0]} cannot be run: {error.strerror}.") from error
        try:
            values = await self._ready_or_ended(child, progress)
        except StartFailed as error:
            # One that has said why is ending by itself, and writes the rest of its log as it does.
            await asyncio.wait({asyncio.ensure_future(child.wait())}, timeout=_LAST_WORDS_S)
            await child.stop(grace_s=1.0)
            raise StartFailed(str(error), child.log_tail()) from error
        finally:
            child.close_ready_pipe()
        self._ready_at_s = time.monotonic()
        return values

    async def _ready_or_ended(self, child: Child, progress: Progress) -> dict[str, Any]:
        ready = asyncio.ensure_future(self._await_ready(child, progress))
        ended = asyncio.ensure_future(child.wait())
        try:
            await asyncio.wait({ready, ended}, timeout=self._ready_timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                # Its last words may still be on the way.
                await asyncio.wait({ready}, timeout=_LAST_WORDS_S)
            if ready.done():
                return ready.result()
            if ended.done():
                raise StartFailed(f"It {ended.result()} before it was ready.")
            raise StartFailed(f"It was not ready within {self._ready_timeout_s:.0f} s.")
        finally:
            ready.cancel()
            ended.cancel()
            await asyncio.gather(ready, ended, return_exceptions=True)

    async def keep_running(self, say: Say) -> None:
        """Start it again whenever it ends. Runs until cancelled."""
        assert self._child is not None, "start() comes first"
        failures = 0
        while True:
            reason = await self._child.wait()
            if time.monotonic() - self._ready_at_s >= STABLE_AFTER_S:
                failures = 0
            while not await self._restart(reason, restart_delay_s(failures), say):
                failures += 1
                reason = "did not start"
            failures += 1

    async def _restart(self, reason: str, delay_s: float, say: Say) -> bool:
        say(f"{self.name} {reason}; starting it again" + (f" in {delay_s:.0f} s" if delay_s else ""))
        await asyncio.sleep(delay_s)
        started_s = time.monotonic()
        try:
            await self.start(lambda text, fraction: None)
        except StartFailed as error:
            say(f"{self.name} did not start: {error} Its log is {self.log}.")
            return False
        say(f"{self.name} is back after {time.monotonic() - started_s:.1f} s")
        return True

    async def stop(self, grace_s: float) -> None:
        if self._child is not None:
            await self._child.stop(grace_s)
