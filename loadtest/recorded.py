"""An outcome as locust knows it: one request event, which has the outcome as its context, and rows of statistics.

Rows and not events for TTFT, TPOT and ITL: each event would count as a request in the totals and the failure ratio.
Statistics go from workers to the master, and into CSV, HTML and web UI, by themselves. locust keeps milliseconds.
"""

from __future__ import annotations

import time

from locust.env import Environment

from loadtest.outcome import Outcome
from pdserve.slo import Slo

# As `method` of the rows.
TTFT, TPOT, ITL, GOOD = "TTFT", "TPOT", "ITL", "GOOD"


class RequestFailed(Exception):
    """As locust's exceptions page shows it."""


def record(environment: Environment, path: str, outcome: Outcome, slo: Slo | None) -> None:
    e2e_ms = outcome.e2e_s * 1e3
    environment.events.request.fire(
        request_type="POST",
        name=path,
        response_time=e2e_ms,
        response_length=len(outcome.text),
        exception=None if outcome.ok else RequestFailed(outcome.error),
        context={"outcome": outcome},
        start_time=time.time() - outcome.e2e_s,
        url=path,
    )
    if not outcome.ok:
        return
    _log(environment, path, TTFT, outcome.ttft_s)
    _log(environment, path, TPOT, outcome.tpot_s)
    for gap_s in outcome.gaps_s:
        _log(environment, path, ITL, gap_s)
    if slo is not None and outcome.good(slo):
        _log(environment, path, GOOD, outcome.e2e_s)


def _log(environment: Environment, path: str, method: str, value_s: float | None) -> None:
    if value_s is not None:
        environment.stats.get(path, method).log(round(value_s * 1e3), 0)
