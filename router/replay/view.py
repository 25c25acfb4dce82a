"""What one of several routers knows: its own choices at once, those of the others when workers have told of them."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from router.columns import Columns
from router.hot_prefixes import HotPrefixes
from router.index import PrefixIndex
from router.policy import LoadView, Speed
from router.policy.candidates import SEQUENCES, WAITING_TOKENS
from router.replay.worker import Touched

SHARE_S = 0.01  # until a worker has told all routers of what one sent


@dataclass(frozen=True, slots=True)
class _Load:
    row: int
    amount: float


@dataclass(slots=True)
class RouterView:
    """`report_s`: workers report at multiples of it. Times never decrease."""

    hot: HotPrefixes
    report_s: float
    index: PrefixIndex = field(default_factory=PrefixIndex)
    columns: Columns = field(default_factory=Columns)
    turn: int = 0
    _late: deque[tuple[float, int, Touched | _Load]] = field(default_factory=deque)  # until when, of which worker
    _sent: deque[tuple[float, int, float]] = field(default_factory=deque)  # until when, to which worker, tokens

    def catch_up(self, now_s: float) -> None:
        """What was told until now."""
        sent, late = self._sent, self._late
        while sent and sent[0][0] <= now_s:
            at_s, slot, uncached_tokens = sent.popleft()
            self.note_sent(slot, uncached_tokens, at_s)
        while late and late[0][0] <= now_s:
            _, slot, what = late.popleft()
            if isinstance(what, _Load):
                self.columns.change_load(slot, what.row, what.amount)
            else:
                self.note_blocks(slot, what)

    def note_sent(self, slot: int, uncached_tokens: float, now_s: float) -> None:
        """A request went to the worker."""
        self.columns.add_recent(slot, uncached_tokens, now_s)
        self.columns.change_load(slot, WAITING_TOKENS, uncached_tokens)
        self.columns.change_load(slot, SEQUENCES, 1)

    def note_blocks(self, slot: int, touched: Touched) -> None:
        self.index.stored(slot, touched.stored)
        self.index.removed(slot, touched.removed)

    def hears_sent(self, slot: int, uncached_tokens: float, now_s: float) -> None:
        """Another router sent a request there; the worker tells the others at once."""
        self._sent.append((now_s + SHARE_S, slot, uncached_tokens))

    def reports_blocks(self, slot: int, touched: Touched, now_s: float) -> None:
        self._late.append((self._next_report_s(now_s), slot, touched))

    def reports_load(self, slot: int, row: int, amount: float, now_s: float) -> None:
        self._late.append((self._next_report_s(now_s), slot, _Load(row, amount)))

    def lost(self, slot: int) -> None:
        """The worker's session ended, which every router sees at once."""
        self._late = deque(each for each in self._late if each[1] != slot)
        self._sent = deque(each for each in self._sent if each[1] != slot)
        self.index.remove_worker(slot)
        self.columns.set_load(slot, LoadView())

    def joined(self, slot: int, speed: Speed) -> None:
        self.columns.reset(slot)
        self.columns.set_speed(slot, speed)

    def _next_report_s(self, now_s: float) -> float:
        return (math.floor(now_s / self.report_s) + 1) * self.report_s
