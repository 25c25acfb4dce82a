"""Policies by name. A policy is filters, scorers and a picker; the same state and turn give the same decision."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from importlib.metadata import entry_points

from router.policy.candidate import Candidate, Need, Phase
from router.policy.decision import Considered, Decision, Rejected
from router.policy.filters import FILTERS, Filter, named
from router.policy.scorers import (
    COST,
    LEAST_LOAD,
    PREFIX_ONLY,
    Scorer,
    missing_bytes,
    queued,
    uncached,
    uncached_tokens,
)

log = logging.getLogger(__name__)

# What is needed; candidates, cheapest first; the turn: which of them.
Picker = Callable[[Need, Sequence[Considered], int], Considered]
GROUP = "pdserve.policies"  # entry points of this group are policies too

_TIE = 1e-9


def cheapest(_: Need, considered: Sequence[Considered], turn: int) -> Considered:
    """The lowest cost; equal ones take turns."""
    lowest = considered[0].cost
    tied = [each for each in considered if each.cost - lowest <= _TIE * max(1.0, lowest)]
    return tied[turn % len(tied)]


def scattered(_: Need, considered: Sequence[Considered], turn: int) -> Considered:
    """Any, evenly; which one depends on the turn alone."""
    return random.Random(turn).choice(considered)


def better_of_two(_: Need, considered: Sequence[Considered], turn: int) -> Considered:
    """The cheaper of two drawn ones: spreads work without a look at everyone (Mitzenmacher, 2001)."""
    if len(considered) == 1:
        return considered[0]
    first, second = random.Random(turn).sample(range(len(considered)), 2)
    return considered[min(first, second)]


def sticky(need: Need, considered: Sequence[Considered], turn: int) -> Considered:
    """The same worker for the same session while it is eligible (rendezvous hashing); without one, the cheapest."""
    if need.session is None or need.phase in (Phase.DECODE, Phase.RESUME):
        return cheapest(need, considered, turn)
    session = need.session.encode()
    return max(considered, key=lambda each: blake2b(session + b"\0" + each.worker_id.encode()).digest())


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
        chosen = self.pick(need, considered, turn) if considered else None
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
        link = candidate.link
        return Considered(
            worker_id=candidate.worker_id,
            matched_blocks=candidate.matched_blocks,
            terms=terms,
            cost=sum(terms.values()),
            uncached_tokens=uncached_tokens(need, candidate),
            uncached_s=uncached(need, candidate),
            queued_s=queued(need, candidate),
            step_s=candidate.speed.decode_step_s(candidate.load.sequences + 1),
            move_bytes=missing_bytes(need, candidate) if need.phase is Phase.DECODE else 0,
            transport=link.transport if link is not None else "",
        )


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
