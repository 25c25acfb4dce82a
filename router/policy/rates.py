"""How fast each worker of a roster computes prompts, as columns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from router.policy.candidate import RATE_BITS, Speed
from router.policy.roster import Numbers

RATE_COLUMNS = RATE_BITS + 1
# A float64 is its sign, its exponent and these bits; the exponent of [0.5, 1), whose whole part has no bit, is 1022.
_FRACTION_BITS = np.array(52)
_EXPONENT_OF_HALF = 1022
_HALF = np.array(0.5)  # an array of no dimension: operations with it take two thirds of those with a number


class Rates:
    """`Speed.prefill_s` of all workers at once.

    Attributes:
        speeds: what it was made from.
    """

    __slots__ = ("_constants", "_first", "_of_all_sizes", "_table", "speeds")

    def __init__(self, speeds: tuple[Speed, ...], table: Numbers, first: NDArray[np.intp]) -> None:
        """
        Args:
            table: tokens/s, RATE_COLUMNS for each of some workers, flat: `Speed.prefill_rates` one behind the other.
            first: where in `table` those of each worker begin.
        """
        self.speeds = speeds
        self._table = table
        self._first = first - _EXPONENT_OF_HALF
        self._constants: dict[int, Numbers] = {}
        one_size = all(len(each.prefill_tokens_per_s) < 2 for each in speeds)
        self._of_all_sizes = table.take(first) if one_size else None  # the rate, where it depends on nothing

    @classmethod
    def of(cls, speeds: Sequence[Speed]) -> Rates:
        table = np.array([each.prefill_rates() for each in speeds], dtype=np.float64).reshape(-1)
        return cls(tuple(speeds), table, np.arange(len(speeds)) * RATE_COLUMNS)

    def seconds(self, tokens: Numbers) -> Numbers:
        """Each worker for its own number of tokens, in [0, 2**RATE_BITS); [..., workers]."""
        return tokens / (self._at(np.maximum(tokens, _HALF)) if self._of_all_sizes is None else self._of_all_sizes)

    def become_seconds(self, tokens: Numbers) -> None:
        """As `seconds` of at least one token each, in place."""
        tokens /= self._at(tokens) if self._of_all_sizes is None else self._of_all_sizes

    def _at(self, tokens: Numbers) -> Numbers:
        rates: Numbers = self._table.take(self._first + (tokens.view(np.int64) >> _FRACTION_BITS))
        return rates

    def constant(self, tokens: int) -> Numbers:
        """The same number of tokens on each. Kept: few numbers are asked for."""
        seconds = self._constants.get(tokens)
        if seconds is None:
            seconds = self._constants[tokens] = self.seconds(np.full(len(self.speeds), float(tokens)))
        return seconds
