"""Tasks that go on as long as their process: one that fails says so and begins again, in place of ending in silence."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

log = logging.getLogger(__name__)

PAUSE_S = 1.0


def keep_running(run: Callable[[], Coroutine[Any, Any, None]], name: str) -> asyncio.Task[None]:
    """A task of `run()` until that returns or is cancelled; after any other end it is called again, a pause later."""
    return asyncio.create_task(_keep(run, name), name=name)


async def _keep(run: Callable[[], Coroutine[Any, Any, None]], name: str) -> None:
    while True:
        try:
            return await run()
        except Exception:
            log.exception("task=%r failed, and begins again", name)
        await asyncio.sleep(PAUSE_S)
