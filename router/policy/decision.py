"""The record of a choice: who was chosen, what everyone would have cost, who was left out and why.

A decision keeps the columns that it was made from and builds its records when somebody asks: most are never asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from router.policy.candidate import Need, Phase
from router.policy.candidates import Snapshot
from router.policy.fetches import Fetches
from router.policy.filters import Filter
from router.policy.roster import Flags, Numbers
from router.policy.scorers import missing_bytes


@dataclass(frozen=True, slots=True)
class Considered:
    """A candidate that could have been chosen; `terms` sum to `cost`, in seconds."""

    worker_id: str
    matched_blocks: int
    terms: Mapping[str, float]
    cost: float
    # What is predicted and moved, whatever the policy weighs:
    fetched_blocks: int  # that it brings from the store, behind those that it holds
    fetch_tier: str  # the farthest that they come from; empty for none
    fetch_s: float
    uncached_tokens: int
    uncached_s: float  # to compute them
    queued_s: float  # to compute what waits there
    step_s: float  # a decode step with this request in the batch
    move_bytes: int  # for a hand-over to it; 0 in other phases
    transport: str  # over which they move


@dataclass(frozen=True, slots=True)
class Rejected:
    worker_id: str
    reason: str


class Decision:
    """Read-only. Rows are positions in `seen`, in the order of the worker ids."""

    __slots__ = ("_chosen", "_cost", "_eligible", "_fetches", "_filters", "_need", "_seen", "_terms", "policy", "row")

    def __init__(
        self,
        policy: str,
        need: Need,
        seen: Snapshot,
        filters: Sequence[Filter],
        eligible: Flags,
        terms: Mapping[str, Numbers],
        cost: Numbers,
        row: int | None,
        fetches: Fetches | None,
    ) -> None:
        """`row` was chosen; None: nobody was eligible."""
        self.policy = policy
        self.row = row
        self._need = need
        self._seen = seen
        self._filters = filters
        self._eligible = eligible
        self._terms = terms
        self._cost = cost
        self._fetches = fetches
        self._chosen: Considered | None = None

    @property
    def phase(self) -> Phase:
        return self._need.phase

    @property
    def worker_id(self) -> str | None:
        """Who was chosen."""
        return None if self.row is None else self._seen.roster.worker_ids[self.row]

    @property
    def chosen(self) -> Considered | None:
        """None: nobody was eligible."""
        if self._chosen is None and self.row is not None:
            self._chosen = self._considered(self.row)
        return self._chosen

    @property
    def runner_up(self) -> Considered | None:
        """The cheapest of the others."""
        row = self._runner_up_row()
        return None if row is None else self._considered(row)

    @property
    def runner_up_id(self) -> str | None:
        row = self._runner_up_row()
        return None if row is None else self._seen.roster.worker_ids[row]

    @property
    def considered(self) -> tuple[Considered, ...]:
        """Cheapest first."""
        return tuple(self._considered(row) for row in self._ranked())

    @property
    def filtered(self) -> tuple[Rejected, ...]:
        masks = [(each, each.passes(self._need, self._seen)) for each in self._filters]
        return tuple(
            Rejected(
                self._seen.roster.worker_ids[row],
                next(each.reason(self._need, self._seen, row) for each, mask in masks if not _passes(mask, row)),
            )
            for row in np.flatnonzero(~self._eligible).tolist()
        )

    @property
    def num_filtered(self) -> int:
        return len(self._seen) - int(np.count_nonzero(self._eligible))

    @property
    def best_hit_blocks(self) -> int:
        """The longest prefix that an eligible worker holds: what a choice for locality alone would have reached."""
        return int(self._seen.matched_blocks[self._eligible].max(initial=0.0))

    @property
    def reachable_blocks(self) -> int:
        """The longest prefix that an eligible worker holds or can bring from the store."""
        reach = self._seen.reach
        held = self._seen.matched_blocks if reach is None else np.maximum(self._seen.matched_blocks, reach.blocks[-1])
        return int(held[self._eligible].max(initial=0.0))

    def why_not(self) -> str:
        """One line that says why nobody was eligible."""
        filtered = self.filtered
        if not filtered:
            return "no worker is known"
        return "; ".join(f"{rejected.worker_id}: {rejected.reason}" for rejected in filtered)

    def _runner_up_row(self) -> int | None:
        others = np.where(self._eligible, self._cost, np.inf)
        if self.row is not None:
            others[self.row] = np.inf
        row = int(others.argmin()) if len(others) else 0
        return row if len(others) and others[row] < np.inf else None

    def _ranked(self) -> list[int]:
        """Eligible rows, cheapest first, equal ones by worker id."""
        rows = np.flatnonzero(self._eligible)
        return [int(row) for row in rows[np.argsort(self._cost[rows], kind="stable")]]

    def _considered(self, row: int) -> Considered:
        need, seen = self._need, self._seen
        speed, links = seen.speeds[row], seen.links
        link = links.facts[row] if links is not None else None
        fetched_blocks, fetch_s, tier = 0, 0.0, None
        if (fetches := self._fetches) is not None:
            fetched_blocks, tier = fetches.blocks(row), fetches.tier(row)
            fetch_s = float(fetches.seconds[row])
        tokens = max(1, need.tokens - need.block_size * (int(seen.matched_blocks[row]) + fetched_blocks))
        return Considered(
            worker_id=seen.roster.worker_ids[row],
            matched_blocks=int(seen.matched_blocks[row]),
            terms={name: float(values[row]) for name, values in self._terms.items()},
            cost=float(self._cost[row]),
            fetched_blocks=fetched_blocks,
            fetch_tier=tier.label if tier is not None else "",
            fetch_s=fetch_s,
            uncached_tokens=tokens,
            uncached_s=speed.prefill_s(tokens),
            queued_s=speed.prefill_s(float(seen.waiting_tokens[row])),
            step_s=speed.decode_step_s(int(seen.sequences[row]) + 1),
            move_bytes=int(missing_bytes(need, seen)[row]) if need.phase is Phase.DECODE else 0,
            transport=link.transport if link is not None else "",
        )


def _passes(mask: Flags | None, row: int) -> bool:
    return mask is None or bool(mask[row])
