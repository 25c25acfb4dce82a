"""Prompts for the real model: made-up English of any length, the same in every run, different from seed to seed."""

from __future__ import annotations

import random
from collections.abc import Callable

_WHO = ("the old captain", "a young engineer", "my neighbour", "the committee", "an unknown poet", "the last train")
_DID = ("remembered", "repaired", "described", "followed", "lost", "painted", "measured", "forgot about")
_WHAT = ("the bridge", "a letter from Lisbon", "seven clocks", "the river", "an empty theatre", "the winter harvest")
_WHEN = ("in the spring of 1911", "before dawn", "without a word", "while it rained", "for the third time", "at last")

Encode = Callable[[str], list[int]]


def passage(seed: int, num_sentences: int) -> str:
    rng = random.Random(seed)
    sentences = [
        f"{rng.choice(_WHO).capitalize()} {rng.choice(_DID)} {rng.choice(_WHAT)} {rng.choice(_WHEN)}."
        for _ in range(num_sentences)
    ]
    return " ".join([f"Chapter {seed}.", *sentences])


def passage_tokens(encode: Encode, seed: int, num_tokens: int) -> list[int]:
    """Exactly `num_tokens` token ids. A sentence has more than 8."""
    return encode(passage(seed, num_tokens // 8 + 1))[:num_tokens]
