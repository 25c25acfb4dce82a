"""Filters: why a candidate cannot take what is needed, or None when it can."""

from __future__ import annotations

from collections.abc import Callable

from router.policy.candidate import Candidate, Need, Phase, Role

_DECODES = (Phase.DECODE, Phase.RESUME)

Filter = Callable[[Need, Candidate], str | None]


def alive(_: Need, candidate: Candidate) -> str | None:
    return None if candidate.alive else "not heard from lately"


def compatible(_: Need, candidate: Candidate) -> str | None:
    return candidate.incompatible or None


def not_failed(need: Need, candidate: Candidate) -> str | None:
    return "failed or refused this request before" if candidate.worker_id in need.avoid else None


def role(need: Need, candidate: Candidate) -> str | None:
    if need.phase is Phase.WHOLE:
        return None
    if need.phase in _DECODES:
        return None if candidate.role is Role.DECODE else f"role {candidate.role.value}"
    return f"role {candidate.role.value}" if candidate.role is Role.DECODE else None


def linked(need: Need, candidate: Candidate) -> str | None:
    if need.phase is Phase.PROMPT and candidate.role is Role.PREFILL and candidate.partners == 0:
        return "no open link to a decode worker"
    if need.phase is Phase.DECODE:
        if candidate.link is None:
            return "no link from the prefill worker"
        if not candidate.link.up:
            return f"link down: {candidate.link.error or 'no reason given'}"
    return None


def stored(need: Need, candidate: Candidate) -> str | None:
    return "no store" if need.phase is Phase.RESUME and not candidate.has_store else None


def room(need: Need, candidate: Candidate) -> str | None:
    """Prompts may queue on a worker, so only what can never fit is refused there; a hand-over needs its room now."""
    if need.tokens >= candidate.max_model_len:
        return f"{need.tokens} tokens leave no room in its context of {candidate.max_model_len}"
    if need.needed_blocks > candidate.total_blocks:
        return f"needs {need.needed_blocks} blocks of {candidate.total_blocks}"
    if need.phase in _DECODES:
        missing = need.needed_blocks - candidate.matched_blocks
        if missing > candidate.load.free_blocks:
            return f"needs {missing} blocks, {candidate.load.free_blocks} are free"
        if candidate.load.sequences >= candidate.max_sequences:
            return f"runs {candidate.load.sequences} sequences of {candidate.max_sequences}"
    return None


def named(need: Need, candidate: Candidate) -> str | None:
    """The worker that the client named, if it named one; it runs the prompt."""
    if need.target is None or need.phase in _DECODES or need.target == candidate.worker_id:
        return None
    return "another worker was named"


FILTERS: tuple[Filter, ...] = (compatible, alive, not_failed, role, linked, stored, room)
