"""Policies by name. A policy is filters, scorers and a picker; the same state and turn give the same decision."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from router.policy.candidate import Candidate, Need, Phase
from router.policy.decision import Considered, Decision, Rejected
from router.policy.filters import FILTERS, Filter, named
from router.policy.scorers import COST, Scorer

# Candidates, cheapest first, and the turn: which of them.
Picker = Callable[[Sequence[Considered], int], Considered]

_TIE = 1e-9


def cheapest(considered: Sequence[Considered], turn: int) -> Considered:
    """The lowest cost; equal ones take turns."""
    lowest = considered[0].cost
    tied = [each for each in considered if each.cost - lowest <= _TIE * max(1.0, lowest)]
    return tied[turn % len(tied)]


def scattered(considered: Sequence[Considered], turn: int) -> Considered:
    """Any, evenly; which one depends on the turn alone."""
    return random.Random(turn).choice(considered)


@dataclass(frozen=True, slots=True)
class Policy:
    name: str
    filters: tuple[Filter, ...] = FILTERS
    scorers: Mapping[Phase, Mapping[str, Scorer]] = field(default_factory=dict)  # none: everyone costs the same
    pick: Picker = cheapest

    def decide(self, need: Need, candidates: Sequence[Candidate], turn: int) -> Decision:
        """`turn` rises by one with each decision of a phase: it rotates among equals and seeds a random choice."""
        considered: list[Considered] = []
        filtered: list[Rejected] = []
        for candidate in candidates:
            reason = self._reason_against(need, candidate)
            if reason is None:
                considered.append(self._score(need, candidate))
            else:
                filtered.append(Rejected(candidate.worker_id, reason))
        considered.sort(key=lambda each: (each.cost, each.worker_id))
        chosen = self.pick(considered, turn) if considered else None
        runner_up = next((each for each in considered if each is not chosen), None)
        return Decision(self.name, need.phase, chosen, runner_up, tuple(considered), tuple(filtered))

    def _reason_against(self, need: Need, candidate: Candidate) -> str | None:
        for check in self.filters:
            reason = check(need, candidate)
            if reason is not None:
                return reason
        return None

    def _score(self, need: Need, candidate: Candidate) -> Considered:
        scorers = self.scorers.get(need.phase, {})
        terms = {name: scorer(need, candidate) for name, scorer in scorers.items()}
        return Considered(candidate.worker_id, candidate.matched_blocks, terms, sum(terms.values()))


POLICIES: Mapping[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy("cost", scorers=COST),
        Policy("round_robin"),
        Policy("random", pick=scattered),
        Policy("direct", filters=(*FILTERS, named), scorers=COST),
    )
}
