"""How long a decode step takes, by batch and by the KV that it reads: a regression that a few outliers do not move.

    step_s = base + per_sequence * sequences + per_token * context_tokens        none of them negative

Observations are gathered in cells by the powers of two of both sizes. A cell counts by its medians, so an outlier in it
counts for nothing; cells that were not seen for long count ever less, so a lasting change is followed. The three
numbers are the least-squares fit through the cells, with a weak pull towards what is usual, which decides only where
the observations say nothing (one batch size ever, or contexts that grow with the batch).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

_WINDOW = 31  # observations a cell
_CELLS = 64
_HALF_LIFE = 512  # observations after which a cell that saw none of them counts half
_PULL = 1e-3
# A cell that is farther off than this many times the median miss counts less, the farther it is (Huber).
_TOLERATED = 2.0
_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class StepModel:
    """Seconds."""

    base_s: float = 0.02
    per_sequence_s: float = 0.001
    per_token_s: float = 0.0

    def step_s(self, sequences: float, context_tokens: float) -> float:
        return self.base_s + self.per_sequence_s * sequences + self.per_token_s * context_tokens

    def largest_batch(self, step_s: float, context_each: float) -> float:
        """Sequences of so much context whose step takes at most `step_s`; 0 when already one takes longer."""
        each_s = self.per_sequence_s + self.per_token_s * context_each
        if self.base_s + each_s > step_s:
            return 0.0
        return (step_s - self.base_s) / each_s if each_s > 0.0 else float("inf")


USUAL_STEP = StepModel()


@dataclass(slots=True)
class _Cell:
    """Of observations of about the same sizes."""

    seen: deque[tuple[float, float, float]] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    newest: int = 0  # number of its last observation

    def point(self) -> tuple[float, float, float]:
        sequences, context, step_s = zip(*self.seen, strict=True)
        return median(sequences), median(context), median(step_s)


class StepLearner:
    """Of one worker."""

    def __init__(self) -> None:
        self._cells: dict[tuple[int, int], _Cell] = {}
        self._count = 0
        self._model: StepModel | None = USUAL_STEP  # None: to be fitted again

    @property
    def count(self) -> int:
        """Steps that it has seen."""
        return self._count

    def note(self, sequences: int, context_tokens: int, step_s: float) -> None:
        """What is not a positive finite time is left out."""
        if sequences <= 0 or not 0.0 < step_s < float("inf"):
            return
        self._count += 1
        key = sequences.bit_length(), context_tokens.bit_length()
        if key not in self._cells and len(self._cells) >= _CELLS:
            del self._cells[min(self._cells, key=lambda each: self._cells[each].newest)]
        cell = self._cells.setdefault(key, _Cell())
        cell.seen.append((float(sequences), float(context_tokens), step_s))
        cell.newest = self._count
        self._model = None

    @property
    def model(self) -> StepModel:
        if self._model is None:
            points = [cell.point() for cell in self._cells.values()]
            weights = [
                len(cell.seen) * 0.5 ** ((self._count - cell.newest) / _HALF_LIFE) for cell in self._cells.values()
            ]
            self._model = fit(points, weights)
        return self._model


def fit(points: Sequence[tuple[float, float, float]], weights: Sequence[float]) -> StepModel:
    """Through (sequences, context tokens, seconds); what would be negative is 0, and the rest fitted without it."""
    scale = max(1.0, max(context for _, context, _ in points))  # numbers of one size, for the sake of the solution
    rows = [(1.0, sequences, context / scale) for sequences, context, _ in points]
    times = [step_s for _, _, step_s in points]
    typical_s = median(times)
    # Usual: one part in twenty of a step for each sequence. It only decides what the points leave open.
    usual = (0.8 * typical_s, 0.05 * typical_s, 0.0)
    found = _fit_positive(rows, times, weights, usual)
    for _ in range(_ROUNDS):
        misses_s = [abs(time_s - _product(row, found)) for row, time_s in zip(rows, times, strict=True)]
        tolerated_s = _TOLERATED * max(median(misses_s), 1e-9)
        trust = [
            weight * min(1.0, tolerated_s / max(miss, 1e-12)) for weight, miss in zip(weights, misses_s, strict=True)
        ]
        found = _fit_positive(rows, times, trust, usual)
    return StepModel(found[0], found[1], found[2] / scale)


def _product(row: Sequence[float], found: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(row, found, strict=True))


def _fit_positive(
    rows: Sequence[tuple[float, ...]], times: Sequence[float], weights: Sequence[float], usual: Sequence[float]
) -> list[float]:
    free = [0, 1, 2]
    while True:
        found = _solve(rows, times, weights, free, usual)
        negative = [at for at in free if found[at] < 0.0]
        if not negative:
            return found
        free.remove(min(negative, key=lambda at: found[at]))


def _solve(
    rows: Sequence[tuple[float, ...]],
    times: Sequence[float],
    weights: Sequence[float],
    free: Sequence[int],
    usual: Sequence[float],
) -> list[float]:
    """Weighted ridge regression on the free columns, the others being 0: Gauss on the normal equations."""
    total = sum(weights)
    size = len(free)
    table = [[0.0] * (size + 1) for _ in range(size)]
    for row, time_s, weight in zip(rows, times, weights, strict=True):
        for a, column_a in enumerate(free):
            for b, column_b in enumerate(free):
                table[a][b] += weight * row[column_a] * row[column_b]
            table[a][size] += weight * row[column_a] * time_s
    for a, column in enumerate(free):
        table[a][a] += _PULL * total
        table[a][size] += _PULL * total * usual[column]
    for a in range(size):  # symmetric and positive definite: no pivoting needed
        for b in range(a + 1, size):
            factor = table[b][a] / table[a][a]
            table[b] = [x - factor * y for x, y in zip(table[b], table[a], strict=True)]
    found = [0.0, 0.0, 0.0]
    for a in range(size - 1, -1, -1):
        known = sum(table[a][b] * found[free[b]] for b in range(a + 1, size))
        found[free[a]] = (table[a][size] - known) / table[a][a]
    return found
