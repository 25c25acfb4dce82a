"""The record of a choice: who was chosen, what everyone would have cost, who was left out and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from router.policy.candidate import Phase


@dataclass(frozen=True, slots=True)
class Considered:
    """A candidate that could have been chosen; `terms` sum to `cost`, in tokens of prefill work."""

    worker_id: str
    matched_blocks: int
    terms: Mapping[str, float]
    cost: float


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

    def why_not(self) -> str:
        """One line that says why nobody was eligible."""
        if not self.filtered:
            return "no worker is known"
        return "; ".join(f"{rejected.worker_id}: {rejected.reason}" for rejected in self.filtered)
