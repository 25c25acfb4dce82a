"""The order in which waiting requests get their turn. Pure: time comes in as an argument.

    due       by deadline slack: whose latest start that meets its TTFT objective comes first, goes first
    late      that start has passed: it goes behind all that are due, so that it makes no other one late

Each tenant has a clock of the work that it was given. By as much as it is ahead of the least served tenant that waits,
its requests count as if they were due that much later: fairness in the unit of the deadlines.

Nothing starves. A request's place rises with time, since what comes later is due later; when it is late, one turn in
`LATE_TURNS` is for the late ones, the oldest first.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Generic, TypeVar

LATE_TURNS = 10
# Free places for each one that a tenant may hold: one alone may fill 4/5 of the queue, and others find room beside it
# (dynamic thresholds: Choudhury and Hahne, 1998).
_FREE_SHARE = 4
_LEAST_WORK_S = 1e-3  # a turn is never free


@dataclass(slots=True, eq=False)
class Queued:
    """One request that waits. Times in seconds on one clock."""

    tenant: str
    slo_class: str
    queued_s: float  # since when
    due_s: float = 0.0  # latest start that meets its objective, as predicted
    work_s: float = 0.0  # that it will take of a worker, as predicted
    priority_s: float = 0.0  # by which the client wants it to count as due later


Item = TypeVar("Item", bound=Queued)


class RequestQueue(Generic[Item]):
    """At most `places` requests; each leaves once, by `take` or by `remove`.

    Both lists stay in the order of their turns as requests come, leave and become late. Only a turn of a tenant beside
    which another waits moves requests, and then they are sorted again.
    """

    def __init__(self, places: int) -> None:
        self._places = places
        self._due: list[Item] = []
        self._late: list[Item] = []
        self._late_from_s = math.inf  # the first of `_due` is late after that
        self._by_tenant: Counter[str] = Counter()
        self._by_class: Counter[str] = Counter()
        self._served_s: dict[str, float] = {}  # clocks of those that wait, and of those that are ahead
        self._due_turns = 0  # since a late one had its turn, while some waited

    def __len__(self) -> int:
        return len(self._due) + len(self._late)

    def __iter__(self) -> Iterator[Item]:
        """In no order that means anything; not while it changes."""
        return chain(self._due, self._late)

    def depths(self) -> dict[str, int]:
        """Requests by SLO class."""
        return dict(self._by_class)

    def refuses(self, tenant: str) -> str | None:
        """Why one more of this tenant has no place; None when it has one."""
        free = self._places - len(self)
        if free <= 0:
            return "queue_full"
        return "tenant_share" if self._by_tenant[tenant] >= _FREE_SHARE * free else None

    def add(self, item: Item) -> None:
        floor_s = self._floor_s()
        self._by_tenant[item.tenant] += 1
        self._by_class[item.slo_class] += 1
        if self._by_tenant[item.tenant] == 1:
            # A tenant that was away has no credit from then.
            self._served_s[item.tenant] = max(self._served_s.get(item.tenant, floor_s), floor_s)
            self._forget(floor_s)
        insort(self._due, item, key=self._due_rank)
        self._late_from_s = min(self._late_from_s, item.due_s)

    def take(self, item: Item, now_s: float) -> None:
        """Its turn has come."""
        self._sort_out(now_s)
        late = item.due_s < now_s
        self._due_turns = 0 if late or not self._late else self._due_turns + 1
        self.remove(item)
        self._served_s[item.tenant] += max(item.work_s, _LEAST_WORK_S)
        if 0 < self._by_tenant[item.tenant] < len(self):
            self._due.sort(key=self._due_rank)
            self._late.sort(key=self._late_rank)

    def remove(self, item: Item) -> None:
        """It waits no longer; of no effect on one that does not."""
        for items in (self._due, self._late):
            if item in items:
                items.remove(item)
                _drop_one(self._by_tenant, item.tenant)
                _drop_one(self._by_class, item.slo_class)

    def order(self, now_s: float) -> list[Item]:
        """Who gets the next turn, who the one after it if nothing else happens, and so on."""
        self._sort_out(now_s)
        if self._late and self._due_turns + 1 >= LATE_TURNS:
            return [self._late[0], *self._due, *self._late[1:]]
        return self._due + self._late

    def _sort_out(self, now_s: float) -> None:
        """Those that have become late."""
        if now_s > self._late_from_s:
            for item in [item for item in self._due if item.due_s < now_s]:
                self._due.remove(item)
                insort(self._late, item, key=self._late_rank)
            self._late_from_s = min([item.due_s for item in self._due], default=math.inf)

    def _due_rank(self, item: Item) -> float:
        return item.due_s + item.priority_s + self._served_s[item.tenant]

    def _late_rank(self, item: Item) -> float:
        return item.queued_s + item.priority_s + self._served_s[item.tenant]

    def _floor_s(self) -> float:
        """The clock of the least served tenant that waits; while none does, of the one that is ahead most."""
        waiting = [self._served_s[tenant] for tenant in self._by_tenant]
        return min(waiting) if waiting else max(self._served_s.values(), default=0.0)

    def _forget(self, floor_s: float) -> None:
        """Clocks of tenants that are neither waiting nor ahead say nothing; and there are never more than places."""
        if len(self._served_s) > 2 * self._places:
            kept = {tenant: clock for tenant, clock in self._served_s.items() if tenant in self._by_tenant}
            ahead = sorted(self._served_s.items(), key=lambda pair: -pair[1])[: self._places]
            self._served_s = {tenant: clock for tenant, clock in ahead if clock > floor_s} | kept


def ahead_of(item: Item, order: list[Item]) -> list[Item]:
    """Those whose turn comes before the item's."""
    return order[: order.index(item)]


def _drop_one(counts: Counter[str], name: str) -> None:
    counts[name] -= 1
    if not counts[name]:
        del counts[name]
