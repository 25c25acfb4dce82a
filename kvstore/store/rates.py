"""How fast blocks come out of each tier: assumed at first, then the median of what was measured. Pure."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from kvstore.store.tier import Tier

WINDOW = 16  # measurements that a rate is the median of: an outlier or two change nothing
_MIN_BYTES = 1 << 20  # fewer say little about a rate


@dataclass(frozen=True, slots=True)
class TierPrior:
    """Assumed until measured."""

    latency_s: float
    bytes_per_s: float


PRIORS: Mapping[Tier, TierPrior] = MappingProxyType(
    {
        Tier.HOST: TierPrior(0.001, 4e9),
        Tier.DISK: TierPrior(0.003, 0.8e9),
        Tier.REMOTE: TierPrior(0.010, 0.8e9),
    }
)


class RunningMedian:
    """The median of the latest measurements."""

    def __init__(self, prior: float) -> None:
        self.value = prior
        self._latest: deque[float] = deque(maxlen=WINDOW)

    def add(self, measured: float) -> None:
        self._latest.append(measured)
        self.value = statistics.median(self._latest)


class TierRates:
    """Of one worker."""

    def __init__(self) -> None:
        self._byte_s = {tier: RunningMedian(1 / prior.bytes_per_s) for tier, prior in PRIORS.items()}

    def byte_s(self, tier: Tier) -> float:
        """Seconds a byte, behind the tier's latency."""
        return self._byte_s[tier].value

    def fetched(self, tiers: Sequence[Tier], block_bytes: int, elapsed_s: float) -> bool:
        """Blocks came from these tiers; the time counts for the slowest of them, which the others waited for.

        Returns whether that said something.
        """
        num_bytes = len(tiers) * block_bytes
        if num_bytes < _MIN_BYTES:
            return False
        slowest = max(tiers)
        self._byte_s[slowest].add(max(elapsed_s - PRIORS[slowest].latency_s, 0.0) / num_bytes)
        return True
