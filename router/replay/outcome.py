"""What a replay found, and the objectives that it is judged by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pdserve.slo import Slo, is_good

WINDOW_S = 60.0


@dataclass(frozen=True, slots=True)
class Ended:
    """A request that was answered. `tpot_s` is None for one token."""

    ttft_s: float
    tpot_s: float | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """Ratios are of tokens; `work` is prompt tokens that had to be computed."""

    policy: str
    requests: int
    copied_bytes: int  # of hot prefixes
    failed: int  # lost with their worker, or nobody could take them
    hit_ratio: float
    imbalance: float  # the worker with most work : the mean
    imbalance_60s: float  # the largest of any window of 60 s, among the workers that lived through it
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    tpot_p99_s: float
    good_ratio: float  # of all requests
    goodput_rps: float
    replayed_requests_per_s: float  # speed of the replay itself

    def describe(self) -> dict[str, Any]:
        """JSON-ready."""
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(self).items()}


def goodness(ended: Sequence[Ended], slo: Slo) -> int:
    return sum(is_good(slo, each.ttft_s, each.tpot_s) for each in ended)


def quantiles(values: Sequence[float]) -> tuple[float, float]:
    """p50 and p99; zeros of nothing."""
    if not values:
        return 0.0, 0.0
    found = np.quantile(values, (0.5, 0.99))
    return float(found[0]), float(found[1])


class Work:
    """Tokens computed by each worker, in total and by window."""

    def __init__(self, workers: int, duration_s: float) -> None:
        windows = int(duration_s // WINDOW_S) + 1
        self._by_window = np.zeros((windows, workers))
        self._absent = np.zeros((windows, workers), dtype=np.bool_)

    def note(self, worker: int, tokens: int, now_s: float) -> None:
        self._by_window[self._window(now_s), worker] += tokens

    def absent(self, worker: int, from_s: float, until_s: float) -> None:
        self._absent[self._window(from_s) : self._window(until_s) + 1, worker] = True

    def imbalance(self) -> float:
        """Workers that were away for a while are left out."""
        return _max_to_mean(self._by_window.sum(axis=0)[~self._absent.any(axis=0)])

    def imbalance_60s(self) -> float:
        """The last window, which is cut short, is left out."""
        pairs = zip(self._by_window[:-1], self._absent[:-1], strict=True)
        return max((_max_to_mean(window[~absent]) for window, absent in pairs), default=1.0)

    def _window(self, now_s: float) -> int:
        return min(int(now_s // WINDOW_S), len(self._by_window) - 1)


def _max_to_mean(work: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    total = float(work.sum()) if len(work) else 0.0
    return float(work.max()) * len(work) / total if total else 1.0
