"""The table of rotary embeddings: cosines and sines by position.

Source: RoFormer (arXiv 2104.09864); the llama3 stretching is that of Llama 3.1's reference code.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pdserve.models.config import ModelConfig, RopeScaling


def rope_table(config: ModelConfig, num_positions: int) -> Tensor:
    """[num_positions, head_dim] float32: cos of head_dim/2 frequencies, then sin of the same."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_scaling is not None:
        frequencies = _stretch(frequencies, config.rope_scaling)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def _stretch(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Linear divides all frequencies by `factor`; llama3 only the slow ones, with a ramp in between."""
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)  # within the original context
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = ((turns - scaling.low_freq_factor) / span).clamp(0.0, 1.0)
    return keep * frequencies + (1.0 - keep) * frequencies / scaling.factor
