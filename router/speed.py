"""How fast a worker is, learned from what it did: medians over the last observations, so that outliers move nothing."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from statistics import median

from router.policy.candidate import Speed

_WINDOW = 31  # observations a bucket; the newest median follows a lasting change after half of them
# Below this many tokens a prefill's time is mostly the cost of a step, and a rate would say little about longer ones.
LEAST_TOKENS = 16


class SpeedLearner:
    """One worker's rates, by powers of two of the prompt's uncached length and of the batch."""

    def __init__(self, tell: Callable[[Speed], None] = lambda speed: None) -> None:
        """`tell` hears of each new `speed`."""
        self._prefill = _Medians()  # tokens/s
        self._step = _Medians()  # seconds
        self._tell = tell
        self.speed = Speed()

    def note_prefill(self, tokens: int, compute_s: float) -> None:
        """`tokens` uncached ones took `compute_s`; what is not a positive finite time is left out."""
        if tokens >= LEAST_TOKENS and 0.0 < compute_s < float("inf"):
            self._prefill.note(tokens, tokens / compute_s)
            self._renew()

    def note_step(self, sequences: int, step_s: float) -> None:
        """A decode step of a batch of `sequences` took `step_s`."""
        if sequences > 0 and 0.0 < step_s < float("inf"):
            self._step.note(sequences, step_s)
            self._renew()

    def _renew(self) -> None:
        self.speed = Speed(prefill_tokens_per_s=self._prefill.by_bits(), step_s=self._step.by_bits())
        self._tell(self.speed)


class _Medians:
    """Of the last values at each size, by the size's bit length."""

    def __init__(self) -> None:
        self._values: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_WINDOW))
        self._medians: dict[int, float] = {}

    def note(self, size: int, value: float) -> None:
        values = self._values[size.bit_length()]
        values.append(value)
        self._medians[size.bit_length()] = median(values)

    def by_bits(self) -> tuple[tuple[int, float], ...]:
        return tuple(sorted(self._medians.items()))


class ErrorMeter:
    """How far predictions were off, as a share of what happened: median and 90th percentile of the last ones."""

    def __init__(self, window: int = 512) -> None:
        self._errors: deque[float] = deque(maxlen=window)

    def note(self, predicted_s: float, actual_s: float) -> None:
        if actual_s > 0.0:
            self._errors.append(abs(predicted_s - actual_s) / actual_s)

    def quantile(self, share: float) -> float | None:
        """None before the first prediction was checked."""
        if not self._errors:
            return None
        return sorted(self._errors)[min(len(self._errors) - 1, int(share * len(self._errors)))]
