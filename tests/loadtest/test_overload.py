"""Under overload, refusals are told from failures, and goodput counts what was good of what came."""

from __future__ import annotations

from loadtest.outcome import Outcome
from loadtest.overload import describe
from loadtest.run import Run
from pdserve.slo import Slo


def outcome(status: int, ttft_s: float | None = None, e2e_s: float = 1.0, error: str = "") -> Outcome:
    return Outcome(status=status, error=error, ttft_s=ttft_s, tpot_s=0.1, gaps_s=(), e2e_s=e2e_s)


def test_a_rate_is_described() -> None:
    outcomes = (
        outcome(200, 1.0),
        outcome(200, 9.0),
        outcome(503, e2e_s=0.01, error="503 overloaded"),
        outcome(429, e2e_s=0.03, error="429"),
        outcome(0, error="timed out"),
    )
    found = describe(Run(outcomes, offered_s=10.0, elapsed_s=12.0, client_cpu_s=0.0), Slo(4.0, 0.25), 0.5)
    assert (found["requests"], found["served"], found["good"], found["refused"]) == (5, 2, 1, 2)
    assert found["goodput_rps"] == 0.1
    assert found["refusal_ms"]["p50"] == 20.0
    assert found["failed"] == {"0 timed out": 1}


def test_nothing_refused_has_no_quantiles() -> None:
    found = describe(Run((outcome(200, 1.0),), 10.0, 12.0, 0.0), Slo(4.0, 0.25), 0.1)
    assert found["refusal_ms"] == {"p50": None, "p99": None}
