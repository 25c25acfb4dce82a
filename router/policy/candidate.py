"""What a policy looks at: what is needed, and each worker as the fleet knows it at this moment."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

# Of a worker that was not measured yet. Equal for all, so they only weigh terms against each other.
USUAL_TOKENS_PER_S = 2_000.0
USUAL_STEP_S = 0.02
USUAL_SEQUENCE_STEP_S = 0.001

RATE_BITS = 32  # bit lengths of token counts that a table of rates tells apart


class Role(Enum):
    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


class Phase(Enum):
    """What the chosen worker is to do."""

    PROMPT = "prompt"  # prefill for a decode worker to be named later, or the whole request on a mixed worker
    WHOLE = "whole"  # the whole request, whatever the worker's role: when a role is missing
    DECODE = "decode"  # take over from the prefill worker
    RESUME = "resume"  # take over from nobody: the KV so far comes out of the store


@dataclass(frozen=True, slots=True)
class LinkFacts:
    """The data-plane link from a prefill worker to a decode worker, as the prefill worker reported it last."""

    up: bool
    transport: str = ""
    bytes_per_s: float = 0.0  # 0: not measured yet
    error: str = ""


@dataclass(frozen=True, slots=True)
class LoadView:
    """A worker's load: the larger of what it reported and what this router knows to be on its way."""

    waiting_tokens: int = 0  # uncached prompt tokens not computed yet
    recent_tokens: float = 0.0  # uncached prompt tokens sent there, halved every half-life: the load's memory
    sequences: int = 0  # running and waiting
    context_tokens: int = 0  # KV that one decode step reads
    free_blocks: int = 0  # free or cached: what an allocation could get


@dataclass(frozen=True, slots=True)
class Speed:
    """Measured rates, each by the bit length of the size it was measured at, ascending; empty: not measured yet."""

    prefill_tokens_per_s: tuple[tuple[int, float], ...] = ()  # by uncached tokens
    step_s: tuple[tuple[int, float], ...] = ()  # of one decode step, by sequences in it

    def prefill_s(self, tokens: float) -> float:
        """To compute so many uncached tokens."""
        rates = self.prefill_tokens_per_s
        return tokens / (_nearest(rates, int(tokens).bit_length()) if rates else USUAL_TOKENS_PER_S)

    def decode_step_s(self, sequences: int) -> float:
        """One step of so many sequences."""
        if not self.step_s:
            return USUAL_STEP_S + USUAL_SEQUENCE_STEP_S * sequences
        return _nearest(self.step_s, sequences.bit_length())

    def prefill_rates(self) -> list[float]:
        """Tokens/s that `prefill_s` uses, by the bit length of the tokens, 0 to RATE_BITS."""
        measured = self.prefill_tokens_per_s
        rates: list[float] = []
        for (bits, rate), (following, _) in pairwise(measured):
            rates += [rate] * ((bits + following) // 2 + 1 - len(rates))
        last = measured[-1][1] if measured else USUAL_TOKENS_PER_S
        return rates + [last] * (RATE_BITS + 1 - len(rates))


def _nearest(measured: tuple[tuple[int, float], ...], bits: int) -> float:
    """The smaller size of two that are equally near."""
    if len(measured) == 1:
        return measured[0][1]
    return min(measured, key=lambda pair: abs(pair[0] - bits))[1]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One worker, as a record; a policy looks at all of them at once, as columns (`Candidates`)."""

    worker_id: str
    role: Role
    alive: bool  # heard from lately
    incompatible: str  # what differs from the fleet, in clear text; empty when nothing does
    max_model_len: int
    max_sequences: int
    total_blocks: int
    block_bytes: int
    load: LoadView = LoadView()
    speed: Speed = Speed()
    matched_blocks: int = 0  # leading blocks of the request that it holds
    leaving: str = ""  # why it takes nothing new, in clear text; empty when it does
    has_store: bool = False  # reads and writes the store of its machine
    partners: int = 0  # decode workers that it has an open link to
    link: LinkFacts | None = None  # in phase DECODE: from the request's prefill worker


@dataclass(frozen=True, slots=True)
class Need:
    """One placement to decide. `tokens` are those whose KV must exist: the prompt and what was generated so far."""

    phase: Phase
    tokens: int
    max_tokens: int  # still to be generated, at most
    block_size: int
    avoid: frozenset[str] = frozenset()  # workers that failed or refused this request
    target: str | None = None  # the worker that the client named; obeyed by the policy `direct`
    session: str | None = None  # what the client calls its conversation; the policy `session` keeps it on one worker

    @property
    def full_blocks(self) -> int:
        return self.tokens // self.block_size

    @property
    def needed_blocks(self) -> int:
        """Blocks for the tokens and one more."""
        return self.tokens // self.block_size + 1
