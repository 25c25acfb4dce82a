"""Policies by name. A policy is filters, scorers and a picker; the same state and turn give the same decision."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from importlib.metadata import entry_points
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from router.policy.candidate import Need, Phase
from router.policy.candidates import Candidates, Snapshot
from router.policy.decision import Decision
from router.policy.filters import FILTERS, Filter, eligible, named
from router.policy.roster import Numbers
from router.policy.scorers import COST, LEAST_LOAD, PREFIX_ONLY, Scorer

log = logging.getLogger(__name__)

GROUP = "pdserve.policies"  # entry points of this group are policies too

_TIE = 1e-9


class Choice(NamedTuple):
    """What a picker picks from: the eligible rows of `seen`, ascending and at least one, and what each would cost. Not
    to be changed.
    """

    need: Need
    seen: Snapshot
    rows: NDArray[np.intp]
    cost: Numbers
    turn: int


Picker = Callable[[Choice], int]  # a position in `rows`


def cheapest(choice: Choice) -> int:
    """The lowest cost; equal ones take turns."""
    cost = choice.cost
    best = int(cost.argmin())
    lowest = float(cost[best])
    tied = (cost <= lowest + _TIE * max(1.0, lowest)).nonzero()[0]
    return best if len(tied) == 1 else int(tied[choice.turn % len(tied)])


def scattered(choice: Choice) -> int:
    """Any, evenly; which one depends on the turn alone."""
    return random.Random(choice.turn).randrange(len(choice.rows))


def better_of_two(choice: Choice) -> int:
    """The cheaper of two drawn ones: spreads work without a look at everyone (Mitzenmacher, 2001)."""
    if len(choice.rows) == 1:
        return 0
    first, second = random.Random(choice.turn).sample(range(len(choice.rows)), 2)
    return min(first, second, key=lambda each: (choice.cost[each], each))


def sticky(choice: Choice) -> int:
    """The same worker for the same session while it is eligible (rendezvous hashing); without one, the cheapest."""
    need = choice.need
    if need.session is None or need.phase in (Phase.DECODE, Phase.RESUME):
        return cheapest(choice)
    session, ids = need.session.encode(), choice.seen.roster.worker_ids
    weights = [blake2b(session + b"\0" + ids[row].encode()).digest() for row in choice.rows]
    return weights.index(max(weights))


@dataclass(frozen=True, slots=True)
class Policy:
    name: str
    filters: tuple[Filter, ...] = FILTERS
    scorers: Mapping[Phase, Mapping[str, Scorer]] = field(default_factory=dict)  # none: everyone costs the same
    pick: Picker = cheapest

    def decide(self, need: Need, candidates: Candidates, turn: int) -> Decision:
        """`turn` rises by one with each decision of a phase: it rotates among equals and seeds a random choice."""
        seen = candidates.seen
        passing, rows = eligible(self.filters, need, seen)
        terms = {name: scorer(need, candidates) for name, scorer in self.scorers.get(need.phase, {}).items()}
        cost, none_s = np.zeros(len(seen)), candidates.none_s
        for values in terms.values():
            if values is not none_s:
                cost += values
        row = None
        if len(rows):
            of_rows = cost if len(rows) == len(cost) else cost[rows]
            row = int(rows[self.pick(Choice(need, seen, rows, of_rows, turn))])
        return Decision(self.name, need, seen, self.filters, passing, terms, cost, row, candidates.fetches(need))


_BUILT_IN = (
    Policy("cost", scorers=COST),
    Policy("round_robin"),
    Policy("random", pick=scattered),
    Policy("direct", filters=(*FILTERS, named), scorers=COST),
    Policy("least_load", scorers=LEAST_LOAD),
    Policy("power_of_two", scorers=LEAST_LOAD, pick=better_of_two),
    Policy("prefix_only", scorers=PREFIX_ONLY),  # a warning: a prefix that all share puts all on one worker
    Policy("session", scorers=COST, pick=sticky),
)


def _named() -> Mapping[str, Policy]:
    """Ours, and those that installed packages offer; what is no policy is left out and said so."""
    policies = {policy.name: policy for policy in _BUILT_IN}
    for entry in entry_points(group=GROUP):
        try:
            policy = entry.load()
        except Exception as error:
            log.error("policy %s from %s cannot be loaded: %s", entry.name, entry.value, error)
            continue
        if isinstance(policy, Policy) and entry.name not in policies:
            policies[entry.name] = replace(policy, name=entry.name)
        else:
            log.error("policy %s from %s is no router.policy.Policy, or its name is taken", entry.name, entry.value)
    return policies


POLICIES: Mapping[str, Policy] = _named()
