"""The thread that runs an engine's steps."""

from __future__ import annotations

import asyncio
import threading

import pytest

from pdserve.engine.engine import Engine
from pdserve.engine.runner import Runner
from pdserve.worker.engine_thread import EngineThread, StepReport
from tests.support.tiny_engine import tiny_engine


class Listener:
    def on_last_chunks(self, computed: list[object]) -> None: ...

    def on_step(self, report: StepReport) -> None: ...


async def test_it_is_made_known_to_the_runner_before_the_first_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which GPU is the current one is a matter of each thread."""
    entered: list[str] = []
    monkeypatch.setattr(Runner, "enter_thread", lambda _: entered.append(threading.current_thread().name))
    thread = EngineThread(tiny_engine(), asyncio.get_running_loop())

    def seen(engine: Engine, now_s: float) -> list[str]:
        return list(entered)

    thread.start(Listener())  # type: ignore[arg-type]
    assert await thread.ask(seen) == ["engine"]
    await thread.stop(5.0)
    assert thread.died.is_set()
