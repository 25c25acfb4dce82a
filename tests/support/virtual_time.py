"""An event loop whose clock jumps to the next timer instead of waiting for it: minutes of traffic in a second of CPU.

Only for code without sockets: whoever waits for one waits in vain, and the clock runs past it.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


class _NoWait:
    """A selector that says by how much it was asked to wait, and does not."""

    def __init__(self, pass_s: Callable[[float], None]) -> None:
        self._selector = selectors.DefaultSelector()
        self._pass_s = pass_s

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise RuntimeError("everything waits, and nothing is going to happen")
        self._pass_s(max(0.0, timeout))
        return self._selector.select(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._selector, name)


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._now_s = 1000.0
        super().__init__(_NoWait(self._pass))  # type: ignore[arg-type]

    def time(self) -> float:
        return self._now_s

    def _pass(self, seconds: float) -> None:
        self._now_s += seconds


@contextmanager
def _monotonic(loop: VirtualLoop) -> Iterator[None]:
    real = time.monotonic
    time.monotonic = loop.time
    try:
        yield
    finally:
        time.monotonic = real


def run_virtual(work: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` with such a clock, `time.monotonic` included. Nothing else may run in the process meanwhile."""
    loop = VirtualLoop()
    try:
        with _monotonic(loop):
            return loop.run_until_complete(work)
    finally:
        loop.close()
