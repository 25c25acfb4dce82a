"""The record of a choice: who was chosen, what everyone would have cost, who was left out and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from router.policy.candidate import Phase


@dataclass(frozen=True, slots=True)
class Considered:
    """A candidate that could have been chosen; `terms` sum to `cost`, in seconds."""

    worker_id: str
    matched_blocks: int
    terms: Mapping[str, float]
    cost: float
    # What is predicted and moved, whatever the policy weighs:
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


@dataclass(frozen=True, slots=True)
class Decision:
    policy: str
    phase: Phase
    chosen: Considered | None  # None: nobody was eligible
    runner_up: Considered | None
    considered: tuple[Considered, ...]  # cheapest first
    filtered: tuple[Rejected, ...]

    @property
    def best_hit_blocks(self) -> int:
        """The longest prefix that an eligible worker holds: what a choice for locality alone would have reached."""
        return max((each.matched_blocks for each in self.considered), default=0)

    def why_not(self) -> str:
        """One line that says why nobody was eligible."""
        if not self.filtered:
            return "no worker is known"
        return "; ".join(f"{rejected.worker_id}: {rejected.reason}" for rejected in self.filtered)
