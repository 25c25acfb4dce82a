"""The ledger of refusals: each is checked afterwards for "could have been served" (early rejection must not go wild).

In shadow the request runs all the same, and was wrongly condemned if it turns out good. One that was really refused is
watched until the latest start that it could have had: if at any look until then a worker had nothing to compute, nobody
waited, and a decode batch had room within its TPOT, it could have been served.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from router.slo import SloClass

_WATCHED = 1024  # at once; of more, the oldest go unchecked


@dataclass(slots=True)
class _Watched:
    slo: SloClass
    due_s: float
    could: bool = False


class RefusalLedger:
    """Times in seconds on the monotonic clock.

    Attributes:
        verdicts: requests by SLO class and what the forecast says against them ("" for nothing).
        refused: requests that were sent away, by SLO class and reason.
        checked: verdicts by "refused" or "taken", and whether that was "right" or "wrong".
    """

    def __init__(self) -> None:
        self.verdicts: Counter[tuple[str, str]] = Counter()
        self.refused: Counter[tuple[str, str]] = Counter()
        self.checked: Counter[tuple[str, str]] = Counter()
        self._watched: deque[_Watched] = deque()

    @property
    def watching(self) -> bool:
        return bool(self._watched)

    def decided(self, slo: SloClass, reason: str | None) -> None:
        self.verdicts[slo.name, reason or ""] += 1

    def turned_away(self, slo: SloClass, reason: str, due_s: float | None = None) -> None:
        """`due_s` is given if a forecast condemned it, so that the forecast is to be checked."""
        self.refused[slo.name, reason] += 1
        if due_s is not None:
            if len(self._watched) >= _WATCHED:
                self._watched.popleft()
                self.checked["refused", "unchecked"] += 1
            self._watched.append(_Watched(slo, due_s))

    def ran(self, condemned: bool, good: bool) -> None:
        """A request of a known verdict came to its end."""
        self.checked["refused" if condemned else "taken", "right" if condemned != good else "wrong"] += 1

    def look(self, now_s: float, has_room: Callable[[SloClass], bool]) -> None:
        """`has_room`: whether a request of that class would begin at once if it came now."""
        room = {slo: has_room(slo) for slo in {each.slo for each in self._watched}}
        kept: deque[_Watched] = deque()
        for each in self._watched:
            each.could = each.could or room[each.slo]
            if each.could or now_s > each.due_s:
                self.checked["refused", "wrong" if each.could else "right"] += 1
            else:
                kept.append(each)
        self._watched = kept

    def describe(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "verdicts": [
                {"class": name, "reason": reason or None, "requests": n}
                for (name, reason), n in sorted(self.verdicts.items())
            ],
            "refused": [
                {"class": name, "reason": reason, "requests": n} for (name, reason), n in sorted(self.refused.items())
            ],
            "checked": {f"{what}_{outcome}": n for (what, outcome), n in sorted(self.checked.items())},
        }
