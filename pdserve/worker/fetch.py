"""Fetch or compute: how many of the blocks that the store holds are worth waiting for. Pure.

A block is of use only behind all those before it, so the choice is where to cut the run: what lies before the cut is
fetched, what lies behind it is computed afterwards (its attention reads every earlier block). The cut is where most
time is saved, by rates that this worker has measured: its own prefill, and each tier's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.store.rates import PRIORS, RunningMedian, TierRates
from kvstore.store.tier import Tier

GRACE_S = 0.2  # what a fetch may take beyond four times its prediction
_MIN_TOKENS = 64  # a step of fewer says little about prefill

_PREFILL_PRIOR_TOKENS_PER_S = 1000.0


@dataclass(frozen=True, slots=True)
class FetchPlan:
    """Fetch the first `num_blocks` of the run within `deadline_s`; 0 blocks: compute everything."""

    num_blocks: int
    deadline_s: float


class FetchPlanner:
    """`block_size` is in tokens."""

    def __init__(self, block_size: int, block_bytes: int) -> None:
        self._block_size = block_size
        self._block_bytes = block_bytes
        self._token_s = RunningMedian(1 / _PREFILL_PRIOR_TOKENS_PER_S)
        self._rates = TierRates()

    def computed(self, num_tokens: int, step_s: float) -> None:
        """A step of prefill was measured."""
        if num_tokens >= _MIN_TOKENS:
            self._token_s.add(step_s / num_tokens)

    def fetched(self, tiers: Sequence[Tier], elapsed_s: float) -> None:
        """Blocks came from these tiers in all this time."""
        self._rates.fetched(tiers, self._block_bytes, elapsed_s)

    def plan(self, tiers: Sequence[Tier]) -> FetchPlan:
        """Where to cut a run of missing blocks that lie in these tiers."""
        best_blocks, best_saved_s, best_fetch_s = 0, 0.0, 0.0
        fetch_s = 0.0
        seen: set[Tier] = set()
        for count, tier in enumerate(tiers, start=1):
            if tier not in seen:
                seen.add(tier)
                fetch_s += PRIORS[tier].latency_s
            fetch_s += self._block_bytes * self._rates.byte_s(tier)
            saved_s = count * self._block_size * self._token_s.value - fetch_s
            if saved_s > best_saved_s:
                best_blocks, best_saved_s, best_fetch_s = count, saved_s, fetch_s
        compute_s = best_saved_s + best_fetch_s
        return FetchPlan(best_blocks, min(compute_s, GRACE_S + 4 * best_fetch_s))
