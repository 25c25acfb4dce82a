"""All candidates at once, as columns: a policy scores a fleet with a few array operations, whatever its size.

Every array has one element a worker, in the order of the worker ids; numbers are float64, so that columns combine
without conversions. Nothing here changes after it was made: a decision keeps its `Snapshot` and is
explained from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from router.policy.candidate import Candidate, LoadView, Need, Speed
from router.policy.fetches import Fetches, Reach, uncached_tokens
from router.policy.rates import Rates
from router.policy.roster import Links, Numbers, Roster

# Rows of a table of loads, a column a worker: its `LoadView`, and the time that what waits there takes.
WAITING_TOKENS, RECENT_TOKENS, SEQUENCES, CONTEXT_TOKENS, FREE_BLOCKS, QUEUED_S = range(6)
LOAD_ROWS = 6


def load_column(load: LoadView, speed: Speed) -> tuple[float, ...]:
    return (
        load.waiting_tokens,
        load.recent_tokens,
        load.sequences,
        load.context_tokens,
        load.free_blocks,
        speed.prefill_s(load.waiting_tokens),
    )


@dataclass(slots=True, eq=False)  # not frozen: to make a frozen one takes four times as long
class Snapshot:
    """What a decision was made from and is explained from. Not to be changed."""

    roster: Roster
    loads: Numbers  # [LOAD_ROWS, workers]
    matched_blocks: Numbers  # leading blocks of the request that each holds
    speeds: tuple[Speed, ...]
    links: Links | None = None  # in phase DECODE
    reach: Reach | None = None  # None: no store node is known, or the phase reads none

    def __len__(self) -> int:
        return len(self.roster.worker_ids)

    def _row(self, at: int) -> Numbers:
        row: Numbers = self.loads[at]
        return row

    @property
    def waiting_tokens(self) -> Numbers:
        return self._row(WAITING_TOKENS)

    @property
    def recent_tokens(self) -> Numbers:
        return self._row(RECENT_TOKENS)

    @property
    def sequences(self) -> Numbers:
        return self._row(SEQUENCES)

    @property
    def context_tokens(self) -> Numbers:
        return self._row(CONTEXT_TOKENS)

    @property
    def free_blocks(self) -> Numbers:
        return self._row(FREE_BLOCKS)


class Candidates:
    """
    Attributes:
        seen: the columns.
    """

    __slots__ = ("_fetches", "_rates", "_uncached_s", "seen")

    def __init__(self, seen: Snapshot, rates: Rates) -> None:
        self.seen = seen
        self._rates = rates
        self._uncached_s: tuple[Need, Numbers] | None = None
        self._fetches: tuple[Need, Fetches] | None = None

    @classmethod
    def of(cls, workers: Iterable[Candidate]) -> Candidates:
        """From records, in any order."""
        ordered = sorted(workers, key=lambda each: each.worker_id)
        columns = [load_column(each.load, each.speed) for each in ordered]
        rates = Rates.of([each.speed for each in ordered])
        seen = Snapshot(
            Roster.of(ordered),
            np.array(columns, dtype=np.float64).reshape(-1, LOAD_ROWS).transpose(),
            np.fromiter((each.matched_blocks for each in ordered), dtype=np.float64),
            rates.speeds,
            Links.of([each.link for each in ordered]),
        )
        return cls(seen, rates)

    @property
    def none_s(self) -> Numbers:
        """Nothing for anybody."""
        return self.seen.roster.none_s

    @property
    def queued_s(self) -> Numbers:
        """To compute what waits on each."""
        seconds: Numbers = self.seen.loads[QUEUED_S]
        return seconds

    @property
    def recent_s(self) -> Numbers:
        """To compute what was sent there lately."""
        return self._rates.seconds(self.seen.loads[RECENT_TOKENS])

    def uncached_s(self, need: Need) -> Numbers:
        """To compute what each neither holds nor fetches."""
        if (fetches := self.fetches(need)) is not None:
            return fetches.compute_s
        if self._uncached_s is None or self._uncached_s[0] is not need:
            tokens = uncached_tokens(need, self.seen.matched_blocks)
            self._rates.become_seconds(tokens)
            self._uncached_s = need, tokens
        return self._uncached_s[1]

    def fetches(self, need: Need) -> Fetches | None:
        """What each would bring from the store first; None where there is none."""
        seen = self.seen
        if seen.reach is None:
            return None
        if self._fetches is None or self._fetches[0] is not need:
            self._fetches = need, Fetches(need, seen.matched_blocks, seen.reach, self._rates)
        return self._fetches[1]

    def constant_prefill_s(self, tokens: int) -> Numbers:
        """`Speed.prefill_s` of each worker for so many tokens, [workers]; not to be changed."""
        return self._rates.constant(tokens)
