"""What forecasts are corrected by, and how far they were off: learned from the requests that ended."""

from __future__ import annotations

import math

from pdserve.timeline import Timeline
from router.admission import Forecast
from router.speed import ErrorMeter
from router.window import Window

_WINDOW = 64
_LEAST = 8  # before so many were seen nothing is corrected
_LEAST_UNIT_S = 0.05  # what is shorter errs by transit and steps, whatever its length
_FARTHEST = 4.0  # a correction by more says that the model is wrong, and would hide it


class Correction:
    """Multiplies predictions by the median of what happened over what was predicted without it."""

    def __init__(self) -> None:
        self._ratios = Window(_WINDOW)
        self.factor = 1.0

    def note(self, predicted_s: float, actual_s: float) -> None:
        """`predicted_s` as it was given, corrected by the factor of then, which has changed little since."""
        if predicted_s <= 0.0 or actual_s <= 0.0:
            return
        self._ratios.add(self.factor * actual_s / predicted_s)
        if len(self._ratios) >= _LEAST:
            self.factor = min(_FARTHEST, max(1.0 / _FARTHEST, self._ratios.median))


class Misses:
    """How far forecasts of TTFT were off, in a unit in which short and long ones are alike: what is computed before a
    request adds its own error each, so that the sum errs by the square root of their number.
    """

    def __init__(self) -> None:
        self._misses = Window(_WINDOW)

    @staticmethod
    def _unit_s(forecast: Forecast) -> float:
        own_s = max(forecast.compute_s, _LEAST_UNIT_S)
        return math.sqrt(own_s * (own_s + max(forecast.prompts_s, forecast.decode_s)))

    def note(self, forecast: Forecast, actual_s: float) -> None:
        """`actual_s` is what `forecast.ttft_s` foresaw."""
        self._misses.add((actual_s - forecast.ttft_s) / self._unit_s(forecast))

    def margin_s(self, forecast: Forecast, confidence: float) -> float:
        """What TTFT is longer than foreseen by at most, in such a share of requests. 0 before some were seen."""
        if len(self._misses) < _LEAST:
            return 0.0
        return max(0.0, self._misses.quantile(confidence) * self._unit_s(forecast))


class Predictor:
    """
    Attributes:
        errors: of forecasts made when a request came (`ttft`, `tpot`), and of TTFT counted from its dispatch on.
        stay_s: how long a request decodes, the median; 0 while unknown.
        misses: of TTFT, for the margin that a request is judged with.
        overrun_s: how much longer than foreseen requests take from their dispatch to their first token, the median.
        handoff_s: what a hand-over adds to the first gap between tokens, the median; None while unknown.
        transit_s: from a worker's part of TTFT to the router's, there and back, the median.
    """

    def __init__(self) -> None:
        self.errors = {"ttft": ErrorMeter(), "ttft_dispatched": ErrorMeter(), "tpot": ErrorMeter()}
        self.prompt = Correction()
        self.step = Correction()
        self._stays_s = Window(_WINDOW)
        self._transits_s = Window(_WINDOW)
        self.stay_s = 0.0
        self._handoffs_s = Window(_WINDOW)
        self.handoff_s: float | None = None
        self.transit_s = 0.05
        self.misses = Misses()
        self._overruns_s = Window(_WINDOW)
        self.overrun_s = 0.0

    def note(self, forecast: Forecast | None, timeline: Timeline) -> None:
        """A request ended that nothing disturbed; `forecast` as it came, of one that was taken for good."""
        if timeline.first_token_s is None or timeline.last_token_s is None or timeline.ttft_s is None:
            return
        self._transits_s.add(timeline.ttft_stages()["deliver"])
        self.transit_s = self._transits_s.median
        if timeline.output_tokens > 1:
            self._stays_s.add(timeline.last_token_s - timeline.first_token_s)
            self.stay_s = self._stays_s.median
        self._note_handoff(timeline)
        if forecast is None:
            return
        if timeline.dispatched_s is not None:
            self._overruns_s.add(timeline.first_token_s - timeline.dispatched_s - forecast.compute_s)
            self.overrun_s = max(0.0, self._overruns_s.median)
        self.misses.note(forecast, timeline.ttft_s)
        self.errors["ttft"].note(forecast.ttft_s, timeline.ttft_s)
        self.prompt.note(forecast.ttft_s - forecast.waited_s, timeline.ttft_s - forecast.waited_s)
        if timeline.tpot_s is not None:
            self.errors["tpot"].note(forecast.tpot_s, timeline.tpot_s)
            self.step.note(forecast.tpot_s, timeline.tpot_s)

    def _note_handoff(self, timeline: Timeline) -> None:
        """The first gap, less one like those after it."""
        gap_s, gaps = sum(timeline.handoff_stages().values()), timeline.output_tokens - 1
        if gap_s == 0.0 or gaps < 2 or timeline.tpot_s is None:
            return
        step_s = (timeline.tpot_s * gaps - gap_s) / (gaps - 1)
        self._handoffs_s.add(max(0.0, gap_s - step_s))
        if len(self._handoffs_s) >= _LEAST:
            self.handoff_s = self._handoffs_s.median
