"""How far the prefix index is from the truth: what it said of a chosen worker, against what the worker then found."""

from __future__ import annotations


class DriftMeter:
    """Counts blocks since the start; requests are the samples, each of the worker that was chosen for it."""

    def __init__(self) -> None:
        self.predicted_blocks = 0  # that the index said the worker holds
        self.found_blocks = 0  # that it held
        self.false_hit_blocks = 0  # predicted, not found
        self.false_miss_blocks = 0  # found, not predicted

    def note(self, predicted_blocks: int, cached_tokens: int, prompt_tokens: int, block_size: int) -> None:
        """`cached_tokens` were in the worker's own pool. The last token is always computed: its block cannot count."""
        most = (prompt_tokens - 1) // block_size
        predicted, found = min(predicted_blocks, most), min(cached_tokens // block_size, most)
        self.predicted_blocks += predicted
        self.found_blocks += found
        self.false_hit_blocks += max(0, predicted - found)
        self.false_miss_blocks += max(0, found - predicted)

    @property
    def false_hit_ratio(self) -> float:
        return self.false_hit_blocks / self.predicted_blocks if self.predicted_blocks else 0.0

    @property
    def false_miss_ratio(self) -> float:
        return self.false_miss_blocks / self.found_blocks if self.found_blocks else 0.0
