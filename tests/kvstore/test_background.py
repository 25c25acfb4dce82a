from __future__ import annotations

import asyncio
import logging

import pytest

from kvstore import background
from kvstore.background import keep_running


async def test_a_task_that_fails_says_so_and_begins_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(background, "PAUSE_S", 0.0)
    ends = iter((ValueError("one"), KeyError("two"), None))

    async def run() -> None:
        if (error := next(ends)) is not None:
            raise error

    with caplog.at_level(logging.ERROR):
        await keep_running(run, "sweep")
    assert [record.exc_info[1].args for record in caplog.records if record.exc_info] == [("one",), ("two",)]  # type: ignore[union-attr]
    assert "sweep" in caplog.text


async def test_a_cancelled_task_ends() -> None:
    task = keep_running(asyncio.Event().wait, "waits")  # type: ignore[arg-type]
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
