"""What a load test reports is what the server's own metrics say."""

from __future__ import annotations

import asyncio
import csv
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from loadtest.result import Alone, Result, Sweep
from loadtest.run import run_open
from loadtest.statistics import summarise
from loadtest.target import find_target
from loadtest.workload import Synthetic
from pdserve.slo import Slo
from tests.support.stack import Stack, metric

pytest.importorskip("matplotlib", reason="requirements/loadtest.txt is not installed")

from loadtest.report import as_json

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]
RATE_RPS, DURATION_S = 1.5, 10.0
WORKLOAD = Synthetic(prompt_tokens=384, output_tokens=16, shared_tokens=128)
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
    # An objective in the widest gap between two requests: no request is good by one clock and late by the other only.
    ttfts_s = sorted(outcome.server.ttft_s for outcome in run.outcomes if outcome.server and outcome.server.ttft_s)
    below, above = max(pairwise(ttfts_s), key=lambda pair: pair[1] - pair[0])
    slo = Slo((below + above) / 2, 60.0)
    result = Result("disaggregated", Alone(1.0, 1.0, 0.1), (summarise(run, slo, RATE_RPS),))
    [point] = as_json(Sweep(WORKLOAD.name, slo, "given", (result,), {}, {}))["results"][0]["points"]

    assert told["pdserve_ttft_seconds_count"] == point["requests"] == len(ttfts_s)
    assert told["pdserve_output_tokens_total"] == point["output_tokens"] == 16 * point["requests"]
    assert told["pdserve_prompt_tokens_total"] == point["prompt_tokens"] == 384 * point["requests"]
    assert told["pdserve_cached_tokens_total"] == point["cached_tokens"]
    assert point["cached_tokens"] > 0  # the shared head
    ttft_s = told["pdserve_ttft_seconds_sum"] / told["pdserve_ttft_seconds_count"]
    tpot_s = told["pdserve_tpot_seconds_sum"] / told["pdserve_tpot_seconds_count"]
    assert point["ttft"]["mean_s"] == pytest.approx(ttft_s, rel=0.02)
    assert point["tpot"]["mean_s"] == pytest.approx(tpot_s, rel=0.02)
    assert sum(point["stages_s"].values()) == pytest.approx(ttft_s, rel=0.02)
    assert 0.0 < point["good_share"] < 1.0
    assert point["good_share"] == pytest.approx(point["server_good_share"], abs=0.02)
    disaggregated.assert_pools_whole()


def test_locust_counts_requests_once_and_tokens_beside_them(disaggregated: Stack, tmp_path: Path) -> None:
    before = metric(f"{disaggregated.url}/metrics", "pdserve_requests_total", endpoint="completions", outcome="length")
    command = [sys.executable, "-m", "locust", "-f", "loadtest/locustfile.py", "CompletionUser", "--headless"]
    command += ["--host", disaggregated.url, "--users", "1", "--run-time", "8s", "--csv", str(tmp_path / "found")]
    command += ["--rate", "1.5", "--prompt-tokens", "64", "--output-tokens", "4", "--ttft", "60", "--tpot", "60"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with (tmp_path / "found_stats.csv").open() as table:
        counts = {(row["Type"], row["Name"]): int(row["Request Count"]) for row in csv.DictReader(table)}
    requests = counts["POST", "/completions"]
    assert requests == counts["", "Aggregated"] > 0
    for method in ("TTFT", "TPOT", "GOOD"):
        assert counts[method, "/completions"] == requests
    after = metric(f"{disaggregated.url}/metrics", "pdserve_requests_total", endpoint="completions", outcome="length")
    assert requests <= after - before  # one that was in flight at the end is known to the server alone
    disaggregated.assert_pools_whole()
