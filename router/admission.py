"""Whether a request is taken: the forecast of its TTFT and TPOT against its SLO class. Pure.

A refusal says that the request would have missed its class for the sake of those before it, and after how long that
will be over. What would miss its class on an idle fleet too is judged by the next class that it would meet there, for a
retry can still spare it the wait; what would meet none is taken. Either waits behind those that can still be good
(`router.queue`).
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from enum import Enum

from pdserve.errors import Overloaded, TenantOverQuota
from router.slo import CLASSES, SloClass

LONGEST_RETRY_S = 60
_WINDOW = 64  # verdicts
_LEAST_SURE, _MOST_SURE = 0.5, 0.9
_PLENTY = 0.5  # of the verdicts that refuse: there is always another


class Mode(Enum):
    """What a verdict does. In all of them the queue is bounded, and refuses what it has no place for."""

    OFF = "off"  # nothing is predicted
    SHADOW = "shadow"  # decided and recorded, nothing is refused
    ENFORCE = "enforce"


@dataclass(frozen=True, slots=True)
class Forecast:
    """Of a request that has just come, in seconds.

    Attributes:
        waited_s: since its receipt.
        prompts_s: until what is before it is computed.
        decode_s: until a decode batch has room for it, within the TPOT that the class allows; 0 when it will have.
        compute_s: its own prompt, fetching included.
        tpot_s: a decode step of the batch that it would be in.
        margin_s: what is added to TTFT to judge the request: see `Confidence`.
    """

    waited_s: float
    prompts_s: float
    decode_s: float
    compute_s: float
    tpot_s: float
    margin_s: float = 0.0

    @property
    def ttft_s(self) -> float:
        return self.waited_s + max(self.prompts_s, self.decode_s) + self.compute_s


@dataclass(frozen=True, slots=True)
class Verdict:
    forecast: Forecast
    reason: str | None  # why it is refused: the objective that the forecast misses, "ttft" or "tpot"; None: it is taken
    retry_after_s: int = 0
    enforced: bool = False
    ttft_s: float = math.inf  # that it was judged by

    @property
    def refused(self) -> bool:
        """It was sent away, other than a request that is only said to miss its class."""
        return self.reason is not None and self.enforced


class Confidence:
    """How sure of a forecast one has to be: in what share of the requests that are taken it is to hold.

    While nobody is refused, half: a place that would be idle costs nothing, so all that are more likely good than not
    are taken. The more are refused, the more certainly another one would have had the place: then nearly all taken
    ones are to be good.
    """

    def __init__(self) -> None:
        self._refused: deque[bool] = deque(maxlen=_WINDOW)

    def decided(self, refused: bool) -> None:
        self._refused.append(refused)

    @property
    def share(self) -> float:
        refused = sum(self._refused) / _WINDOW
        return _LEAST_SURE + (_MOST_SURE - _LEAST_SURE) * min(1.0, refused / _PLENTY)


def judge(slo: SloClass, forecast: Forecast, mode: Mode) -> Verdict:
    """`mode` is SHADOW or ENFORCE."""
    alone_s = forecast.waited_s + forecast.compute_s
    waits = forecast.prompts_s > 0.0 or forecast.decode_s > 0.0
    ttft_s = slo.ttft_s if alone_s <= slo.ttft_s else _next_ttft_s(alone_s)
    late_s = forecast.ttft_s + forecast.margin_s - ttft_s
    if late_s <= 0.0 or not waits:
        return Verdict(forecast, None, ttft_s=ttft_s)
    reason = "tpot" if forecast.decode_s > forecast.prompts_s else "ttft"
    retry_after_s = min(LONGEST_RETRY_S, max(1, math.ceil(late_s)))
    return Verdict(forecast, reason, retry_after_s, enforced=mode is Mode.ENFORCE, ttft_s=ttft_s)


def _next_ttft_s(alone_s: float) -> float:
    """Of the strictest named class that a request meets which waits for nobody."""
    return min((each.ttft_s for each in CLASSES.values() if alone_s <= each.ttft_s), default=math.inf)


def refusal(verdict: Verdict, slo: SloClass) -> Overloaded:
    """What the client is told. `verdict.reason` is not None."""
    if verdict.reason == "tpot":
        why = f"no room to generate at {slo.tpot_s * 1e3:g} ms per token"
    else:
        ttft_s = verdict.forecast.ttft_s + verdict.forecast.margin_s
        why = f"the first token may take {ttft_s:.1f} s instead of {verdict.ttft_s:g} s"
    return Overloaded(
        f"The server is too busy for the class '{slo.name}': {why}.",
        retry_after_s=verdict.retry_after_s,
        code=f"slo_{verdict.reason}",
    )


def no_place(reason: str) -> Overloaded:
    """Of a queue that has none. `reason` is what `RequestQueue.refuses` said."""
    if reason == "tenant_share":
        return TenantOverQuota("You have as many requests waiting as one client may.", code=reason)
    return Overloaded("As many requests are waiting as can.", code=reason)
