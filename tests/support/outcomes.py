"""Made-up outcomes, runs and sweeps for tests of what is computed from them."""

from __future__ import annotations

from collections.abc import Sequence

from loadtest.outcome import Outcome, ServerTimes
from loadtest.result import Alone, Result, Sweep
from loadtest.run import Run
from loadtest.statistics import Point, summarise
from pdserve.slo import Slo

SLO = Slo(ttft_s=1.0, tpot_s=0.1)


def answered(ttft_s: float = 0.5, tpot_s: float = 0.05, tokens: int = 11) -> Outcome:
    """All of its gaps are `tpot_s`; the server tells the same as the client saw."""
    stages = {"queue": 0.75 * ttft_s, "compute": 0.25 * ttft_s}
    return Outcome(
        status=200,
        error="",
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        gaps_s=(tpot_s,) * (tokens - 1),
        e2e_s=ttft_s + tpot_s * (tokens - 1),
        prompt_tokens=100,
        cached_tokens=25,
        output_tokens=tokens,
        server=ServerTimes(stages, {"transfer": 0.01}),
    )


def failed(status: int = 503) -> Outcome:
    return Outcome(status, f"HTTP {status}: busy", None, None, (), 0.01)


def point(rate_rps: float, outcomes: Sequence[Outcome]) -> Point:
    """Ten seconds of arrivals, twenty until the last answer."""
    return summarise(Run(tuple(outcomes), offered_s=10.0, elapsed_s=20.0, client_cpu_s=0.5), SLO, rate_rps)


def holding(rate_rps: float) -> Point:
    return point(rate_rps, [answered()] * 20)


def late(rate_rps: float) -> Point:
    """Breaks on TTFT."""
    return point(rate_rps, [answered(ttft_s=2.0)] * 15 + [answered()] * 5)


def slow(rate_rps: float) -> Point:
    """Breaks on TPOT."""
    return point(rate_rps, [answered(tpot_s=0.2)] * 15 + [answered()] * 5)


def rejecting(rate_rps: float) -> Point:
    return point(rate_rps, [failed()] * 5 + [answered()] * 15)


def sweep(**points: Sequence[Point]) -> Sweep:
    """Targets by name."""
    results = tuple(Result(name, Alone(0.9, 0.3, 0.03), tuple(own)) for name, own in points.items())
    return Sweep("64 in, 11 out", SLO, "given", results, {"points at most": "6"}, {"CPU": "one that <counts>"})
