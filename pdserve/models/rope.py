"""The table of rotary embeddings: cosines and sines by position.

Sources: RoFormer (arXiv 2104.09864); llama3: Llama 3.1's reference code; dynamic: NTK-aware scaling as in transformers;
yarn: arXiv 2309.00071; longrope: arXiv 2402.13753.

The keys in the pool stay as they were rotated, and prompts share them. So a rotation depends on the position alone,
never on how long its sequence has become: kinds that stretch with the length do it once for all, by the longest
sequence that is served. Up to the length that the model was trained for, transformers computes the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pdserve.models.rope_config import Rope


def rope_table(rope: Rope, num_positions: int) -> Tensor:
    """[num_positions, dim] float32: cos of dim/2 frequencies, then sin of the same."""
    frequencies = _frequencies(rope, num_positions)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=1) * rope.amplitude


def _frequencies(rope: Rope, num_positions: int) -> Tensor:
    """[dim / 2] float32, in radians a position."""
    beyond = rope.stretches_at(num_positions) > 0
    if rope.kind == "dynamic" and beyond:
        length = rope.factor * num_positions / rope.original_max_positions - (rope.factor - 1)
        return _plain(rope.theta * length ** (rope.dim / (rope.dim - 2)), rope.dim)
    plain = _plain(rope.theta, rope.dim)
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _between(plain, rope.factor, _llama3_keep(plain, rope))
    if rope.kind == "yarn":
        return _between(plain, rope.factor, _yarn_keep(rope))
    if rope.kind == "longrope":
        return plain / torch.tensor(rope.long_factors if beyond else rope.short_factors)
    return plain


def _plain(theta: float, dim: int) -> Tensor:
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    return torch.reciprocal(theta**exponents)


def _between(frequencies: Tensor, factor: float, keep: Tensor) -> Tensor:
    """As they are where `keep` is 1, divided by `factor` where it is 0."""
    return keep * frequencies + (1.0 - keep) * frequencies / factor


def _llama3_keep(frequencies: Tensor, rope: Rope) -> Tensor:
    """By how often a frequency turns within the original context."""
    turns = rope.original_max_positions * frequencies / (2 * math.pi)
    return ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0.0, 1.0)


def _yarn_keep(rope: Rope) -> Tensor:
    """A ramp over the index of the frequency, between those that turn beta_fast and beta_slow times."""

    def index(turns: float) -> float:
        return rope.dim * math.log(rope.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = index(rope.beta_fast), index(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    ramp = (torch.arange(rope.dim // 2, dtype=torch.float32) - low) / (high - low if high != low else 0.001)
    return 1.0 - ramp.clamp(0.0, 1.0)
