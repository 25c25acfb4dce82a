"""Scorers: what a candidate would cost, term by term, in seconds, from the worker's measured speed.

    prompt   uncached + queued + MEMORY * recent + SEQUENCE * sequences (where decoding shares the step)
    decode   bytes to move + SEQUENCE * sequences + CONTEXT * context

The memory term is what keeps equal workers equal: a term of in-flight work alone sends everything to one worker as
soon as requests are short or rare. A weight of 0.05 with a half-life of 30 s reaches nearly every prefix at an even
load (tests/router/test_policy_trace.py replays a public trace).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from router.policy.candidate import Candidate, Need, Phase, Role

Scorer = Callable[[Need, Candidate], float]

RECENT_HALF_LIFE_S = 30.0
RECENT_WEIGHT = 0.05
# A decoding sequence slows its neighbours for as long as it runs: worth this many tokens of prefill.
SEQUENCE_TOKENS = 32.0
# Reading the KV of a context token once is this small a part of computing it.
CONTEXT_WEIGHT = 0.01
UNMEASURED_LINK_BYTES_PER_S = 1e9


def uncached_tokens(need: Need, candidate: Candidate) -> int:
    """Never below one: the last token is computed even when every block is there."""
    return max(1, need.tokens - candidate.matched_blocks * need.block_size)


def missing_bytes(need: Need, candidate: Candidate) -> int:
    """What a hand-over to it moves."""
    return max(0, need.full_blocks + 1 - candidate.matched_blocks) * candidate.block_bytes


def uncached(need: Need, candidate: Candidate) -> float:
    return candidate.speed.prefill_s(uncached_tokens(need, candidate))


def queued(_: Need, candidate: Candidate) -> float:
    waiting = candidate.load.waiting_tokens
    return candidate.speed.prefill_s(waiting) if waiting else 0.0


def recent(_: Need, candidate: Candidate) -> float:
    tokens = candidate.load.recent_tokens
    return RECENT_WEIGHT * candidate.speed.prefill_s(tokens) if tokens else 0.0


def shared_step(_: Need, candidate: Candidate) -> float:
    """Sequences that decode in the same step as this prompt; a prefill worker has none."""
    return 0.0 if candidate.role is Role.PREFILL else sequences(_, candidate)


def move(need: Need, candidate: Candidate) -> float:
    measured = candidate.link.bytes_per_s if candidate.link is not None else 0.0
    return missing_bytes(need, candidate) / (measured or UNMEASURED_LINK_BYTES_PER_S)


def sequences(_: Need, candidate: Candidate) -> float:
    return candidate.speed.prefill_s(SEQUENCE_TOKENS) * candidate.load.sequences


def context(_: Need, candidate: Candidate) -> float:
    return CONTEXT_WEIGHT * candidate.load.context_tokens * candidate.speed.prefill_s(1)


_PROMPT: Mapping[str, Scorer] = {"uncached": uncached, "queued": queued, "recent": recent, "shared_step": shared_step}
_DECODE: Mapping[str, Scorer] = {"move": move, "sequences": sequences, "context": context}

COST: Mapping[Phase, Mapping[str, Scorer]] = {
    Phase.PROMPT: _PROMPT,
    Phase.WHOLE: _PROMPT,
    Phase.DECODE: _DECODE,
    Phase.RESUME: _DECODE,
}
_LOAD: Mapping[str, Scorer] = {"queued": queued, "sequences": sequences}

LEAST_LOAD: Mapping[Phase, Mapping[str, Scorer]] = dict.fromkeys(Phase, _LOAD)
PREFIX_ONLY: Mapping[Phase, Mapping[str, Scorer]] = {phase: {"uncached": uncached} for phase in Phase}
