"""What policies look at, by worker slot, brought up to date as it changes: a decision copies, it builds nothing.

Loads and speeds change with every report and request, the roster (who there is) seldom. All methods run in the event
loop, or in a replay under its virtual clock; time is passed in, in seconds, never decreasing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvstore.store.rates import PRIORS
from router.index import Match
from router.policy import Candidate, Candidates, Links, LoadView, Roster, Snapshot, Speed
from router.policy.candidates import (
    CONTEXT_TOKENS,
    FREE_BLOCKS,
    LOAD_ROWS,
    QUEUED_S,
    RECENT_TOKENS,
    SEQUENCES,
    WAITING_TOKENS,
)
from router.policy.fetches import FETCH_TIERS, Reach
from router.policy.rates import RATE_COLUMNS, Rates
from router.policy.scorers import RECENT_HALF_LIFE_S
from router.store_index import Stored

_LATENCY_S = np.array([[PRIORS[tier].latency_s] for tier in FETCH_TIERS])
_PRIOR_BYTE_S = np.array([[1.0 / PRIORS[tier].bytes_per_s] for tier in FETCH_TIERS])
_FIRST_SLOTS = 64  # a multiple of 8, as a match's column needs it


@dataclass(frozen=True, slots=True, eq=False)
class Seats:
    """A roster, and the slot of each of its workers."""

    roster: Roster
    slots: NDArray[np.intp]
    latency_s: NDArray[np.float64]  # out of each tier of the store; [3, workers]
    store_rows: NDArray[np.intp]  # [2, workers]: of `Stored.rows`, in the host tier and anywhere on its node
    in_order: bool  # `slots` are 0, 1, ...: copied in a third of the time

    @classmethod
    def of(cls, workers: Sequence[tuple[int, Candidate]]) -> Seats:
        """Workers with their slots, in any order."""
        ordered = sorted(workers, key=lambda pair: pair[1].worker_id)
        slots = np.array([slot for slot, _ in ordered], dtype=np.intp)
        roster = Roster.of([worker for _, worker in ordered])
        latency_s = np.tile(_LATENCY_S, (1, len(ordered)))
        store_rows = np.stack([2 * roster.store_node, 2 * roster.store_node + 1])
        return cls(roster, slots, latency_s, store_rows, bool((slots == np.arange(len(slots))).all()))

    def take(self, table: NDArray[np.float64]) -> NDArray[np.float64]:
        """A copy of its columns, [..., slots], in the order of the roster."""
        if self.in_order:
            return table[..., : len(self.slots)].copy()
        return table.take(self.slots, axis=-1)


class Columns:
    def __init__(self) -> None:
        self._loads = np.zeros((LOAD_ROWS, _FIRST_SLOTS))
        self._speeds = [Speed()] * _FIRST_SLOTS
        self._rates = np.tile(np.array(Speed().prefill_rates()), (_FIRST_SLOTS, 1))
        self._byte_s = np.tile(_PRIOR_BYTE_S, (1, _FIRST_SLOTS))  # out of each tier of the store
        self._block_s_of: tuple[Seats, NDArray[np.float64]] | None = None  # seconds a block; while it is true
        self._stale_rates: set[int] = set()  # slots whose speed changed
        self._stale_queues: set[int] = set()  # slots whose waiting tokens or speed changed
        self._rates_of: tuple[Seats, Rates] | None = None  # the last answer, while it is true
        self._decayed_s = -math.inf  # the time that the recent tokens are true at

    def reset(self, slot: int) -> None:
        """Another worker takes the slot: nothing is known of it."""
        while slot >= len(self._speeds):
            self._grow()
        self._loads[:, slot] = 0.0
        self._byte_s[:, slot] = _PRIOR_BYTE_S[:, 0]
        self._block_s_of = None
        self.set_speed(slot, Speed())

    def set_load(self, slot: int, load: LoadView) -> None:
        """All but the recent tokens, which only `add_recent` changes."""
        self.set_figures(slot, load.waiting_tokens, load.sequences, load.context_tokens, load.free_blocks)

    def set_figures(
        self, slot: int, waiting_tokens: float, sequences: float, context_tokens: float, free_blocks: float
    ) -> None:
        """As `set_load`, without a record."""
        loads = self._loads
        loads[WAITING_TOKENS, slot] = waiting_tokens
        loads[SEQUENCES, slot] = sequences
        loads[CONTEXT_TOKENS, slot] = context_tokens
        loads[FREE_BLOCKS, slot] = free_blocks
        self._stale_queues.add(slot)

    def change_load(self, slot: int, row: int, amount: float) -> None:
        """One figure of a load, by `amount`; `row` is one of `router.policy.candidates`."""
        self._loads[row, slot] += amount
        if row == WAITING_TOKENS:
            self._stale_queues.add(slot)

    def add_recent(self, slot: int, tokens: float, now_s: float) -> None:
        """Uncached tokens were sent to the worker; they count half after each half-life."""
        self._decay(now_s)
        self._loads[RECENT_TOKENS, slot] += tokens

    def set_speed(self, slot: int, speed: Speed) -> None:
        self._speeds[slot] = speed
        self._stale_rates.add(slot)
        self._stale_queues.add(slot)

    def set_byte_s(self, slot: int, byte_s: Sequence[float]) -> None:
        """Seconds a byte out of the store, by `FETCH_TIERS`."""
        self._byte_s[:, slot] = byte_s
        self._block_s_of = None

    def candidates(
        self, seats: Seats, match: Match, now_s: float, links: Links | None = None, stored: Stored | None = None
    ) -> Candidates:
        """The workers of `seats` now. To be scored at once: its table of rates is the living one."""
        self._decay(now_s)
        self._freshen()
        rates = self._rates_at(seats)
        seen = Snapshot(
            seats.roster,
            seats.take(self._loads),
            seats.take(match.column(len(self._speeds))),
            rates.speeds,
            links,
            self._reach(seats, stored) if stored is not None else None,
        )
        return Candidates(seen, rates)

    def _freshen(self) -> None:
        """What follows from loads and speeds."""
        for slot in self._stale_rates:
            self._rates[slot] = self._speeds[slot].prefill_rates()
            self._rates_of = None
        self._stale_rates.clear()
        for slot in self._stale_queues:
            self._loads[QUEUED_S, slot] = self._speeds[slot].prefill_s(self._loads.item(WAITING_TOKENS, slot))
        self._stale_queues.clear()

    def _rates_at(self, seats: Seats) -> Rates:
        if self._rates_of is None or self._rates_of[0] is not seats:
            speeds = tuple(self._speeds[slot] for slot in seats.slots.tolist())
            self._rates_of = seats, Rates(speeds, self._rates.reshape(-1), seats.slots * RATE_COLUMNS)
        return self._rates_of[1]

    def _reach(self, seats: Seats, stored: Stored) -> Reach:
        blocks = np.empty((len(FETCH_TIERS), len(seats.roster)))
        blocks[:2] = stored.rows.take(seats.store_rows)
        anywhere = seats.roster.store_shares * float(stored.most)
        np.maximum(blocks[1], anywhere, out=blocks[2])
        return Reach(blocks, self._block_s_at(seats), seats.latency_s)

    def _block_s_at(self, seats: Seats) -> NDArray[np.float64]:
        if self._block_s_of is None or self._block_s_of[0] is not seats:
            self._block_s_of = seats, seats.take(self._byte_s) * seats.roster.block_bytes
        return self._block_s_of[1]

    def _decay(self, now_s: float) -> None:
        if now_s > self._decayed_s:
            self._loads[RECENT_TOKENS] *= math.exp2((self._decayed_s - now_s) / RECENT_HALF_LIFE_S)
            self._decayed_s = now_s

    def _grow(self) -> None:
        slots = len(self._speeds)
        self._loads = np.concatenate([self._loads, np.zeros((LOAD_ROWS, slots))], axis=1)
        self._rates = np.concatenate([self._rates, np.tile(np.array(Speed().prefill_rates()), (slots, 1))])
        self._byte_s = np.concatenate([self._byte_s, np.tile(_PRIOR_BYTE_S, (1, slots))], axis=1)
        self._speeds += [Speed()] * slots
