"""`python -m loadtest overload`: what becomes of goodput when more comes than can be served, one JSON line a rate.

The target as in `sweep`. A server of this machine is started with the environment, so PDSERVE_ADMISSION chooses what
its router does with requests that it predicts to miss their class.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

from loadtest.options import add_workload_options, workload_of
from loadtest.outcome import Outcome
from loadtest.run import Run, run_open
from loadtest.session import fitted
from loadtest.sweep import open_target
from loadtest.target import Target
from pdserve.slo import Slo

_WARM_SEED = 20_001
_REFUSED = (429, 503)


def describe(run: Run, slo: Slo, rate_rps: float) -> dict[str, Any]:
    """JSON-ready. Goodput is good requests over the time from the first arrival to the last answer that was good."""
    outcomes = run.outcomes
    good = [each for each in outcomes if each.good(slo)]
    refused_ms = [each.e2e_s * 1e3 for each in outcomes if each.status in _REFUSED]
    served = [each for each in outcomes if each.ok]
    return {
        "offered_rps": rate_rps,
        "requests": len(outcomes),
        "served": len(served),
        "good": len(good),
        "goodput_rps": round(len(good) / run.offered_s, 3),
        "refused": len(refused_ms),
        "refusal_ms": {"p50": _quantile(refused_ms, 0.5), "p99": _quantile(refused_ms, 0.99)},
        "failed": dict(Counter(_failure(each) for each in outcomes if not each.ok and each.status not in _REFUSED)),
        "ttft_s": {"p50": _quantile([each.ttft_s or 0.0 for each in served], 0.5)},
        "tpot_s": {"p50": _quantile([each.tpot_s or 0.0 for each in served], 0.5)},
        "elapsed_s": round(run.elapsed_s, 1),
    }


def _quantile(values: list[float], share: float) -> float | None:
    if len(values) < 2:
        return round(values[0], 3) if values else None
    return round(statistics.quantiles(values, n=100, method="inclusive")[round(share * 100) - 1], 3)


def _failure(outcome: Outcome) -> str:
    return f"{outcome.status} {outcome.error}"[:120]


def _slo_page(target: Target) -> dict[str, Any] | None:
    """What the server says about its forecasts and refusals; None for another kind of server."""
    try:
        with urllib.request.urlopen(f"http://{target.host}:{target.port}/v1/slo", timeout=5) as response:
            page: dict[str, Any] = json.load(response)
    except (OSError, ValueError):
        return None
    return {name: page.get(name) for name in ("prediction_error", "admission", "classes")}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="loadtest overload", description=__doc__)
    parser.add_argument("target", metavar="TARGET", help="mixed, disaggregated or NAME=URL")
    parser.add_argument("--out", type=Path, default=Path("loadtest-report"), help="folder of logs")
    parser.add_argument("--rate", type=float, required=True, help="capacity: 1x, requests a second")
    parser.add_argument("--times", type=float, nargs="+", default=[1.0, 2.0, 3.0])
    parser.add_argument("--ttft", type=float, default=4.0, help="objective in seconds; that of the class `standard`")
    parser.add_argument("--tpot", type=float, default=0.25)
    parser.add_argument("--point", type=float, default=25.0, help="seconds of arrivals a rate")
    parser.add_argument("--timeout", type=float, default=120.0)
    add_workload_options(parser)
    args = parser.parse_args(arguments)
    workload, slo = workload_of("synthetic", args), Slo(args.ttft, args.tpot)
    args.out.mkdir(parents=True, exist_ok=True)
    with open_target(args.target, None, args.out) as (_, target):
        warm = fitted(workload.sessions(args.rate, _WARM_SEED), args.rate, args.point / 2)
        asyncio.run(run_open(target, warm, args.point / 2, args.timeout))
        for seed, times in enumerate(args.times):
            rate_rps = args.rate * times
            sessions = fitted(workload.sessions(rate_rps, seed), rate_rps, args.point)
            run = asyncio.run(run_open(target, sessions, args.point, args.timeout))
            print(json.dumps({"times": times, **describe(run, slo, rate_rps)}), flush=True)
        print(json.dumps({"server": _slo_page(target)}), flush=True)
