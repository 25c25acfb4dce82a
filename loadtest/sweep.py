"""`python -m loadtest sweep`: the highest rate with at least 90 % of requests good, for one or several targets.

A target is `mixed` or `disaggregated`, which are started on this machine one after the other, or `NAME=URL` of any
OpenAI-compatible endpoint. Objectives that are not given are set from the machine: multiples of what one request alone
takes on the first target. Writes report.html and report.json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loadtest.environment import environment
from loadtest.live import Count, read_count
from loadtest.options import KINDS, add_workload_options, workload_of
from loadtest.report import write_report
from loadtest.result import ATTAINMENT, Alone, Result, Sweep, held
from loadtest.run import run_closed, run_open
from loadtest.search import next_rate
from loadtest.session import fitted
from loadtest.statistics import Point, summarise
from loadtest.target import Target, find_target
from loadtest.verdict import verdict
from loadtest.workload import Workload
from pdserve.bench.deployment import TOPOLOGIES, deployed
from pdserve.slo import Slo

TTFT_SCALE, TPOT_SCALE = 8.0, 2.5
_ALONE_REQUESTS = 6
_CLOSED_REQUESTS_A_CLIENT = 3
# Until a server has noticed who gave up.
_SETTLE_S = 0.5
# Above every seed of a point, which are numbered from 0.
_ALONE_SEED, _CLOSED_SEED = 10_001, 10_002


@dataclass(frozen=True, slots=True)
class Plan:
    """How each target is measured. `closed_clients`: of one more run in a closed loop; 0 for none."""

    workload: Workload
    first_rps: float
    max_points: int
    point_s: float
    timeout_s: float
    closed_clients: int


def measure_alone(target: Target, plan: Plan) -> Alone:
    """One request at a time. Raises SystemExit if one fails: there would be nothing to measure."""
    sessions = plan.workload.sessions(1.0, _ALONE_SEED)
    run = asyncio.run(run_closed(target, sessions, 1, _ALONE_REQUESTS, plan.timeout_s))
    for outcome in run.outcomes:
        if not outcome.ok:
            raise SystemExit(f"{target.host}:{target.port} does not answer: {outcome.error}")
    first, *warm = run.outcomes
    assert first.ttft_s is not None
    ttft_s = min(outcome.ttft_s for outcome in warm if outcome.ttft_s is not None)
    tpots_s = [outcome.tpot_s for outcome in warm if outcome.tpot_s is not None]
    return Alone(first.ttft_s, ttft_s, min(tpots_s, default=0.0))


def measure(name: str, target: Target, alone: Alone, plan: Plan, slo: Slo) -> Result:
    """Rate after rate until the highest that holds is known, as `search` says."""
    target = replace(target, slo=slo)
    points: dict[float, Point] = {}
    for seed in itertools.count():
        tried = {rate: held(point) for rate, point in points.items()}
        rate_rps = next_rate(tried, plan.first_rps, plan.max_points)
        if rate_rps is None:
            break
        sessions = fitted(plan.workload.sessions(rate_rps, seed), rate_rps, plan.point_s)
        before = read_count(target)
        run = asyncio.run(run_open(target, sessions, plan.point_s, plan.timeout_s))
        points[rate_rps] = point = summarise(run, slo, rate_rps, _counted_since(before, target))
        print(f"  {rate_rps:6.3g} req/s: {point.good_share:4.0%} of {point.requests} good", flush=True)
    closed = None
    if plan.closed_clients:
        count = plan.closed_clients * _CLOSED_REQUESTS_A_CLIENT
        endless = plan.workload.sessions(1.0, _CLOSED_SEED)
        run = asyncio.run(run_closed(target, endless, plan.closed_clients, count, plan.timeout_s))
        closed = summarise(run, slo, len(run.outcomes) / run.elapsed_s)
    return Result(name, alone, tuple(points[rate] for rate in sorted(points)), closed)


def _counted_since(before: Count | None, target: Target) -> Count | None:
    time.sleep(_SETTLE_S)
    after = read_count(target)
    return after.since(before) if before is not None and after is not None else None


@contextlib.contextmanager
def open_target(text: str, model: str | None, log_dir: Path, up: Sequence[str] = ()) -> Iterator[tuple[str, Target]]:
    """The name and the target of `mixed`, `disaggregated` or `NAME=URL`, ready while entered.

    Args:
        up: further options of `pdserve up` for the first two.
    """
    name, _, url = text.partition("=")
    if url:
        yield name, _found(url, model)
    elif text in TOPOLOGIES:
        with deployed((*TOPOLOGIES[text], *up), log_dir / f"{text}.log") as deployment:
            yield text, _found(deployment.url, None)
    else:
        raise SystemExit(f"{text!r} is none of {', '.join(TOPOLOGIES)} and no NAME=URL")


def _name(text: str) -> str:
    return text.partition("=")[0]


def _described(text: str, up: Sequence[str]) -> str:
    return shlex.join(("pdserve", "up", *TOPOLOGIES[text], *up)) if text in TOPOLOGIES else text.partition("=")[2]


def _found(url: str, model: str | None) -> Target:
    try:
        return find_target(url, model, os.environ.get("OPENAI_API_KEY"))
    except ValueError as error:
        raise SystemExit(str(error)) from error


def sweep(
    targets: list[str], plan: Plan, slo: Slo | None, model: str | None, out: Path, up: Sequence[str] = ()
) -> Sweep:
    """Measures every target in turn; `slo` None sets it from the first, `up` is as of `open_target`."""
    origin, results, environ = "given", [], environment()
    for text in targets:
        with open_target(text, model, out, up) as (name, target):
            print(f"{name}: {plan.workload.name}", flush=True)
            alone = measure_alone(target, plan)
            if slo is None:
                slo = Slo(TTFT_SCALE * alone.ttft_s, TPOT_SCALE * alone.tpot_s)
                origin = f"TTFT {TTFT_SCALE:g} times and TPOT {TPOT_SCALE:g} times one request alone on {name}"
            results.append(measure(name, target, alone, plan, slo))
    assert slo is not None
    settings = {
        **{_name(text): _described(text, up) for text in targets},
        "a rate holds if good": f"{ATTAINMENT:.0%} of requests, the rejected and failed among them",
        "seconds of arrivals a point": f"{plan.point_s:g}",
        "points at most": str(plan.max_points),
        "a request fails after": f"{plan.timeout_s:g} s",
        "prompts": "of their own at each point",
    }
    return Sweep(plan.workload.name, slo, origin, tuple(results), settings, environ)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="loadtest sweep", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="mixed, disaggregated or NAME=URL; the first two")
    parser.add_argument("--out", type=Path, default=Path("loadtest-report"), help="folder of the report and logs")
    parser.add_argument("--model", help="of a URL; the first that it lists. Its key is read from OPENAI_API_KEY")
    parser.add_argument(
        "--up", default="", metavar="OPTIONS", help="of `pdserve up` for mixed and disaggregated, as one text"
    )
    parser.add_argument("--ttft", type=float, help="objective in seconds; with --tpot")
    parser.add_argument("--tpot", type=float, help="objective in seconds; with --ttft")
    parser.add_argument("--rate", type=float, default=1.0, help="first rate, requests a second")
    parser.add_argument("--points", type=int, default=5, help="rates to try at most, each target")
    parser.add_argument("--point", type=float, default=30.0, help="seconds of arrivals a rate")
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds after which a request has failed")
    parser.add_argument("--closed", type=int, default=0, metavar="CLIENTS", help="also a closed loop of that many")
    parser.add_argument("--workload", choices=KINDS, default="synthetic")
    add_workload_options(parser)
    args = parser.parse_args(arguments)
    if (args.ttft is None) != (args.tpot is None):
        parser.error("--ttft and --tpot go together")
    try:
        workload = workload_of(args.workload, args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    slo = Slo(args.ttft, args.tpot) if args.ttft is not None else None
    plan = Plan(workload, args.rate, args.points, args.point, args.timeout, args.closed)
    # Or what was started would go on without us.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    args.out.mkdir(parents=True, exist_ok=True)
    found = sweep(args.targets or list(TOPOLOGIES), plan, slo, args.model, args.out, shlex.split(args.up))
    write_report(found, args.out)
    print(f"\n{verdict(found)}\n\n{args.out / 'report.html'}")


if __name__ == "__main__":
    main()
