"""Scorers: what each candidate would cost, term by term, in seconds, from the workers' measured speed.

    prompt   uncached + fetch + WORK * uncached + queued + RECENT * recent
             + SEQUENCE * sequences (if decoding shares the step)
    local    uncached + queued + uncached * sequences
    decode   bytes to move + SEQUENCE * sequences + CONTEXT * context

The term of recent work is what keeps equal workers equal: a term of in-flight work alone sends everything to one worker
as soon as requests are short or rare. A weight of 0.1 with a half-life of 30 s reaches nearly every prefix at an even
load. Without WORK, each request looks after itself alone, and busy workers compute the same prefixes over and over.
`pdserve replay` tries weights on a trace; docs/results.md has what it found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from router.policy.candidate import Need, Phase
from router.policy.candidates import Candidates, Snapshot
from router.policy.roster import Numbers

# An element a candidate: lower is better.
Scorer = Callable[[Need, Candidates], Numbers]

RECENT_HALF_LIFE_S = 30.0
RECENT_WEIGHT = 0.1
WORK_WEIGHT = 2.0
# A decoding sequence slows its neighbours for as long as it runs: worth this many tokens of prefill.
SEQUENCE_TOKENS = 32
# Reading the KV of a context token once is this small a part of computing it.
CONTEXT_WEIGHT = 0.01
UNMEASURED_LINK_BYTES_PER_S = 1e9


def missing_bytes(need: Need, seen: Snapshot) -> Numbers:
    """What a hand-over to each moves."""
    return np.maximum(need.full_blocks + 1 - seen.matched_blocks, 0.0) * seen.roster.block_bytes


def uncached(need: Need, candidates: Candidates) -> Numbers:
    return candidates.uncached_s(need)


def fetch(need: Need, candidates: Candidates) -> Numbers:
    """To bring from the store what is sooner brought than computed."""
    fetches = candidates.fetches(need)
    return candidates.none_s if fetches is None else fetches.seconds


def work(need: Need, candidates: Candidates) -> Numbers:
    """What it makes those who come after wait: a prefix computed once more is time of a worker that they would have."""
    return WORK_WEIGHT * candidates.uncached_s(need)


def queued(_: Need, candidates: Candidates) -> Numbers:
    return candidates.queued_s


def recent(_: Need, candidates: Candidates) -> Numbers:
    return RECENT_WEIGHT * candidates.recent_s


def shared_step(_: Need, candidates: Candidates) -> Numbers:
    """Sequences that decode in the same step as this prompt; a prefill worker has none."""
    return sequences(_, candidates) * candidates.seen.roster.shares_step


def stall(need: Need, candidates: Candidates) -> Numbers:
    """What all its sequences together wait while it computes this prompt."""
    return candidates.uncached_s(need) * candidates.seen.sequences


def move(need: Need, candidates: Candidates) -> Numbers:
    seen = candidates.seen
    measured = seen.links.bytes_per_s if seen.links is not None else np.zeros(len(seen))
    return missing_bytes(need, seen) / np.where(measured > 0.0, measured, UNMEASURED_LINK_BYTES_PER_S)


def sequences(_: Need, candidates: Candidates) -> Numbers:
    return candidates.constant_prefill_s(SEQUENCE_TOKENS) * candidates.seen.sequences


def context(_: Need, candidates: Candidates) -> Numbers:
    return CONTEXT_WEIGHT * candidates.seen.context_tokens * candidates.constant_prefill_s(1)


_PROMPT: Mapping[str, Scorer] = {
    "uncached": uncached,
    "fetch": fetch,
    "work": work,
    "queued": queued,
    "recent": recent,
    "shared_step": shared_step,
}
_LOCAL: Mapping[str, Scorer] = {"uncached": uncached, "fetch": fetch, "queued": queued, "stall": stall}
_DECODE: Mapping[str, Scorer] = {"move": move, "sequences": sequences, "context": context}

COST: Mapping[Phase, Mapping[str, Scorer]] = {
    Phase.PROMPT: _PROMPT,
    Phase.WHOLE: _PROMPT,
    Phase.LOCAL: _LOCAL,
    Phase.DECODE: _DECODE,
    Phase.RESUME: _DECODE,
}
_LOAD: Mapping[str, Scorer] = {"queued": queued, "sequences": sequences}

LEAST_LOAD: Mapping[Phase, Mapping[str, Scorer]] = dict.fromkeys(Phase, _LOAD)
PREFIX_ONLY: Mapping[Phase, Mapping[str, Scorer]] = {phase: {"uncached": uncached} for phase in Phase}
