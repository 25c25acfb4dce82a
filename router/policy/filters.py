"""Filters: which candidates can take what is needed, and of each other one the reason in clear text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from router.policy.candidate import Need, Phase
from router.policy.candidates import Snapshot
from router.policy.roster import Flags

_DECODES = (Phase.DECODE, Phase.RESUME)
_ON_DECODE = (*_DECODES, Phase.LOCAL)  # on a worker of that role, which must have room at once


@dataclass(frozen=True, slots=True, eq=False)  # told apart by identity: they are keys of every decision
class Filter:
    """
    Attributes:
        passes: an element a candidate; None when all pass.
        reason: why a candidate that does not pass is left out.
        lasting: `passes` looks at nothing but the phase and the roster, so its answer is kept with the roster.
    """

    passes: Callable[[Need, Snapshot], Flags | None]
    reason: Callable[[Need, Snapshot, int], str]
    lasting: bool = False


class Eligible(NamedTuple):
    """Not to be changed."""

    passing: Flags
    rows: NDArray[np.intp]  # of those who pass, ascending


def eligible(filters: tuple[Filter, ...], need: Need, seen: Snapshot) -> Eligible:
    """Who passes all of them."""
    memo, key = seen.roster.memo, (need.phase, filters)
    found: Eligible | None = memo.get(key)
    if found is None:
        found = memo[key] = _all_of([each.passes(need, seen) for each in filters if each.lasting], len(seen))
    masks = [mask for each in filters if not each.lasting and (mask := each.passes(need, seen)) is not None]
    return _all_of([found.passing, *masks], len(seen)) if masks else found


def _all_of(masks: Sequence[Flags | None], workers: int) -> Eligible:
    passing = np.ones(workers, dtype=np.bool_)
    for mask in masks:
        if mask is not None:
            passing &= mask
    return Eligible(passing, passing.nonzero()[0])


def _without(seen: Snapshot, worker_ids: frozenset[str]) -> Flags | None:
    if not worker_ids:
        return None
    return np.array([each not in worker_ids for each in seen.roster.worker_ids], dtype=np.bool_)


def _has_role(need: Need, seen: Snapshot) -> Flags | None:
    if need.phase is Phase.WHOLE:
        return None
    return seen.roster.decode if need.phase in _ON_DECODE else ~seen.roster.decode


def _has_partner(need: Need, seen: Snapshot) -> Flags | None:
    if need.phase is not Phase.PROMPT:
        return None
    return (seen.roster.partners > 0) | ~seen.roster.prefill


def _is_linked(need: Need, seen: Snapshot) -> Flags | None:
    if need.phase is not Phase.DECODE:
        return None
    return seen.links.up if seen.links is not None else np.zeros(len(seen), dtype=np.bool_)


def _why_unlinked(_: Need, seen: Snapshot, at: int) -> str:
    link = seen.links.facts[at] if seen.links is not None else None
    return "no link from the prefill worker" if link is None else f"link down: {link.error or 'no reason given'}"


def _has_room(need: Need, seen: Snapshot) -> Flags | None:
    """Prompts may queue on a worker, so only what can never fit is refused there; a hand-over needs its room now."""
    roster = seen.roster
    if (
        need.phase not in _ON_DECODE
        and roster.least_model_len > need.tokens
        and roster.least_total_blocks >= need.needed_blocks
    ):
        return None
    fits: Flags = (roster.max_model_len > need.tokens) & (roster.total_blocks >= need.needed_blocks)
    if need.phase not in _ON_DECODE:
        return fits
    fits &= seen.free_blocks >= need.needed_blocks - seen.matched_blocks
    fits &= seen.sequences < roster.max_sequences
    return fits


def _why_no_room(need: Need, seen: Snapshot, at: int) -> str:
    roster = seen.roster
    if roster.max_model_len[at] <= need.tokens:
        return f"{need.tokens} tokens leave no room in its context of {roster.max_model_len[at]:.0f}"
    if roster.total_blocks[at] < need.needed_blocks:
        return f"needs {need.needed_blocks} blocks of {roster.total_blocks[at]:.0f}"
    missing = need.needed_blocks - seen.matched_blocks[at]
    if missing > seen.free_blocks[at]:
        return f"needs {missing:.0f} blocks, {seen.free_blocks[at]:.0f} are free"
    return f"runs {seen.sequences[at]:.0f} sequences of {roster.max_sequences[at]:.0f}"


def _is_target(need: Need, seen: Snapshot) -> Flags | None:
    if need.target is None or need.phase in _DECODES:
        return None
    return np.array([each == need.target for each in seen.roster.worker_ids], dtype=np.bool_)


compatible = Filter(
    lambda _, seen: seen.roster.compatible, lambda _, seen, at: seen.roster.incompatible[at], lasting=True
)
alive = Filter(lambda _, seen: seen.roster.alive, lambda _, seen, at: "not heard from lately", lasting=True)
staying = Filter(lambda _, seen: seen.roster.takes_requests, lambda _, seen, at: seen.roster.leaving[at], lasting=True)
not_failed = Filter(
    lambda need, seen: _without(seen, need.avoid), lambda need, seen, at: "failed or refused this request before"
)
role = Filter(_has_role, lambda _, seen, at: f"role {seen.roster.roles[at].value}", lasting=True)
partnered = Filter(_has_partner, lambda need, seen, at: "no open link to a decode worker", lasting=True)
linked = Filter(_is_linked, _why_unlinked)
stored = Filter(
    lambda need, seen: seen.roster.has_store if need.phase is Phase.RESUME else None,
    lambda need, seen, at: "no store",
    lasting=True,
)
room = Filter(_has_room, _why_no_room)
# The worker that the client named, if it named one; it runs the prompt.
named = Filter(_is_target, lambda need, seen, at: "another worker was named")

FILTERS: tuple[Filter, ...] = (compatible, alive, staying, not_failed, role, partnered, linked, stored, room)
