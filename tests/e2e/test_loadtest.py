"""What a load test reports is what the server's own metrics say."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from loadtest.live import Count, read_count
from loadtest.outcome import Outcome
from loadtest.result import Alone, Result, Sweep
from loadtest.run import Run, run_closed, run_open
from loadtest.statistics import summarise
from loadtest.target import find_target
from loadtest.workload import Synthetic
from pdserve.slo import Slo
from tests.support.stack import Stack, metric, wait_for

pytest.importorskip("matplotlib", reason="requirements/loadtest.txt is not installed")

from loadtest.report import as_json

pytestmark = pytest.mark.e2e
RATE_RPS, DURATION_S = 1.5, 10.0
WORKLOAD = Synthetic(prompt_tokens=384, output_tokens=16, shared_tokens=128)
SLO = Slo(60.0, 1e-4)
SERIES = (
    "pdserve_output_tokens_total",
    "pdserve_prompt_tokens_total",
    "pdserve_cached_tokens_total",
    "pdserve_ttft_seconds_sum",
    "pdserve_ttft_seconds_count",
    "pdserve_tpot_seconds_sum",
    "pdserve_tpot_seconds_count",
)


def read(stack: Stack) -> dict[str, float]:
    return {name: metric(f"{stack.url}/metrics", name) for name in SERIES}


def test_report_agrees_with_the_metrics_of_the_server(disaggregated: Stack) -> None:
    target = find_target(disaggregated.url, None)
    before = read(disaggregated)
    run = asyncio.run(run_open(target, WORKLOAD.sessions(RATE_RPS, seed=1), DURATION_S, timeout_s=60.0))
    told = {name: value - before[name] for name, value in read(disaggregated).items()}

    assert run.outcomes
    assert all(outcome.ok for outcome in run.outcomes), [outcome.error for outcome in run.outcomes]
    result = Result("disaggregated", Alone(1.0, 1.0, 0.1), (summarise(run, SLO, RATE_RPS),))
    [point] = as_json(Sweep(WORKLOAD.name, SLO, "given", (result,), {}, {}))["results"][0]["points"]

    assert told["pdserve_ttft_seconds_count"] == point["requests"] == len(run.outcomes)
    assert told["pdserve_output_tokens_total"] == point["output_tokens"] == 16 * point["requests"]
    assert told["pdserve_prompt_tokens_total"] == point["prompt_tokens"] == 384 * point["requests"]
    assert told["pdserve_cached_tokens_total"] == point["cached_tokens"]
    assert point["cached_tokens"] > 0  # the shared head
    ttft_s = told["pdserve_ttft_seconds_sum"] / told["pdserve_ttft_seconds_count"]
    tpot_s = told["pdserve_tpot_seconds_sum"] / told["pdserve_tpot_seconds_count"]
    assert point["ttft"]["mean_s"] == pytest.approx(ttft_s, rel=0.02)
    assert point["tpot"]["mean_s"] == pytest.approx(tpot_s, rel=0.02)
    assert sum(point["stages_s"].values()) == pytest.approx(ttft_s, rel=0.02)
    disaggregated.assert_pools_whole()


def test_live_goodput_of_the_server_is_the_client_s(disaggregated: Stack) -> None:
    """Good ones, late ones, and one whose client gave up waiting: failures count, on both sides."""
    target = find_target(disaggregated.url, None)
    before = read_count(target)
    assert before is not None

    def ask(workload: Synthetic, count: int, slo: Slo = SLO, timeout_s: float = 60.0) -> tuple[Outcome, ...]:
        sessions = workload.sessions(1.0, seed=2)
        return asyncio.run(run_closed(replace(target, slo=slo), sessions, 2, count, timeout_s)).outcomes

    # Nothing has a TPOT with one token, and no second token comes within 0.1 ms: no clock has to be trusted.
    outcomes = ask(Synthetic(64, 1), 4) + ask(Synthetic(64, 4), 3)
    outcomes += ask(Synthetic(1500, 4), 1, Slo(0.1, 60.0), timeout_s=0.3)

    def counted() -> Count:
        after = read_count(target)
        assert after is not None
        return after.since(before)

    wait_for(lambda: counted().requests == len(outcomes), 10.0, lambda: str(counted()))
    point = summarise(Run(outcomes, 1.0, 1.0, 0.0), SLO, 1.0, counted())
    assert (point.requests, point.failed, point.good_share) == (8, 1, 0.5)
    assert point.server_good_share == point.good_share
    disaggregated.assert_pools_whole()
