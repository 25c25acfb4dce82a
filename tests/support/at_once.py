"""Several requests at once, to one deployment or to several: on its own a request keeps no more than a core busy."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def at_once(*calls: Callable[[], T]) -> list[T]:
    """What they return, in their order; raises what the first of them to have failed raised, when all are over."""
    with ThreadPoolExecutor(len(calls)) as executor:
        running = [executor.submit(call) for call in calls]
    return [each.result() for each in running]
