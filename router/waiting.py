"""A request that waits in the router's queue, and what those that wait will bring to the workers they wait for."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass, field

from router.admission import Verdict
from router.fleet import Fleet
from router.placement import Placed
from router.policy import Decision
from router.queue import Queued
from router.slo import SloClass


@dataclass(slots=True, eq=False)
class Waiting(Queued):
    """What the queue holds of a request; times on the monotonic clock."""

    _: KW_ONLY
    request_id: str
    slo: SloClass
    received_s: float
    deadline_s: float
    look: Callable[[], Decision]  # where it would go now; changes nothing
    settle: Callable[[Decision], Placed]  # it goes there
    told: Callable[[Verdict], None]
    judged: bool  # before, so that it is taken whatever is forecast now
    answer: asyncio.Future[Placed] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    plan: tuple[str, int] | None = None  # the worker that it waits for, and the uncached tokens it will bring
    wants_decode: bool = False  # at the last look its worker was free, and no decode batch had room for it
    stranded_s: float | None = None  # since when no worker can take it at all


class Plans:
    """Within its block, those that wait count as load of the workers that they wait for."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._planned: Counter[str] = Counter()

    def __enter__(self) -> Plans:
        return self

    def add(self, waiting: Iterable[Waiting]) -> None:
        more: defaultdict[str, int] = defaultdict(int)
        for item in waiting:
            if item.plan is not None:
                worker_id, tokens = item.plan
                more[worker_id] += tokens
        for worker_id, tokens in more.items():
            if (member := self._fleet.member(worker_id)) is not None:
                member.plan(tokens)
                self._planned[worker_id] += tokens

    def __exit__(self, *_: object) -> None:
        for worker_id, tokens in self._planned.items():
            if (member := self._fleet.member(worker_id)) is not None:
                member.plan(-tokens)
