"""Workloads: what is asked at a given rate. Each seed has prompts of its own, so that no run finds those of another
in a prefix cache."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from loadtest.arrivals import gamma
from loadtest.session import Session, Turn

# Ordinary tokens of nearly every vocabulary: above the special and byte tokens, below the size of a small one.
FIRST_TOKEN, LAST_TOKEN = 1_000, 30_000
_SYLLABLES = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u")]


class Workload(Protocol):
    """
    Attributes:
        name: what a report calls it.
    """

    @property
    def name(self) -> str: ...

    def sessions(self, rate_rps: float, seed: int) -> Iterator[Session]:
        """Endless, in order of `at_s`; `rate_rps` counts requests, not sessions."""
        ...


@dataclass(frozen=True, slots=True)
class Synthetic:
    """Random token ids of exact lengths.

    Attributes:
        cv: coefficient of variation of the gaps between arrivals: 1 is Poisson, more comes in bursts.
        shared_tokens: at the head of every prompt, the same in all of a run (a shared system prompt).
    """

    prompt_tokens: int
    output_tokens: int
    cv: float = 1.0
    shared_tokens: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.shared_tokens < self.prompt_tokens or self.output_tokens < 1:
            raise ValueError("a prompt has tokens of its own after the shared ones, and an answer has one at least")

    @property
    def name(self) -> str:
        shared = f", {self.shared_tokens} shared" if self.shared_tokens else ""
        arrivals = "Poisson" if self.cv == 1.0 else f"bursty (CV {self.cv:g})"
        return f"{self.prompt_tokens} in{shared}, {self.output_tokens} out, {arrivals}"

    def sessions(self, rate_rps: float, seed: int) -> Iterator[Session]:
        rng = random.Random(f"{self.name} {seed}")
        shared = tokens(rng, self.shared_tokens)
        for at_s in gamma(rate_rps, self.cv, rng):
            own = tokens(rng, self.prompt_tokens - self.shared_tokens)
            yield Session(at_s, (Turn(shared + own, self.output_tokens),))


@dataclass(frozen=True, slots=True)
class ShareGpt:
    """Random token ids of lengths like those of ShareGPT's conversations, one turn each, Poisson.

    The means are those of the vLLM paper (arXiv 2309.06180, figure 11). That lengths are log-normal, and how far they
    spread, is assumed.
    """

    mean_prompt_tokens: float = 161.0
    mean_output_tokens: float = 338.0
    sigma: float = 1.0  # of the logarithm
    max_tokens: int = 1000  # of a prompt, and of an answer; longer ones are cut

    @property
    def name(self) -> str:
        return (
            f"lengths as ShareGPT's, about {self.mean_prompt_tokens:g} in and {self.mean_output_tokens:g} out, Poisson"
        )

    def sessions(self, rate_rps: float, seed: int) -> Iterator[Session]:
        rng = random.Random(f"{self.name} {seed}")
        for at_s in gamma(rate_rps, 1.0, rng):
            prompt, output = self._length(rng, self.mean_prompt_tokens), self._length(rng, self.mean_output_tokens)
            yield Session(at_s, (Turn(tokens(rng, prompt), output),))

    def _length(self, rng: random.Random, mean: float) -> int:
        drawn = rng.lognormvariate(math.log(mean) - self.sigma**2 / 2, self.sigma)
        return min(max(round(drawn), 4), self.max_tokens)


@dataclass(frozen=True, slots=True)
class Chat:
    """Conversations over /chat/completions: a system message that all share, and turns that carry the answers before
    them. A word is one to three tokens. Sessions arrive as a Poisson process; their turns wait for the answers."""

    turns: int = 3
    system_words: int = 60
    user_words: int = 40
    output_tokens: int = 48
    think_s: float = 1.0

    @property
    def name(self) -> str:
        return f"chat of {self.turns} turns, {self.user_words} words in, {self.output_tokens} tokens out"

    def sessions(self, rate_rps: float, seed: int) -> Iterator[Session]:
        rng = random.Random(f"{self.name} {seed}")
        system = words(rng, self.system_words)
        for at_s in gamma(rate_rps / self.turns, 1.0, rng):
            thinks_s = itertools.chain((0.0,), (rng.expovariate(1 / self.think_s) for _ in itertools.count()))
            turns = tuple(
                Turn(words(rng, self.user_words), self.output_tokens, think_s)
                for think_s in itertools.islice(thinks_s, self.turns)
            )
            yield Session(at_s, turns, system)


def tokens(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(FIRST_TOKEN, LAST_TOKEN) for _ in range(count))


def words(rng: random.Random, count: int) -> str:
    return " ".join("".join(rng.choices(_SYLLABLES, k=rng.randint(1, 3))) for _ in range(count))
