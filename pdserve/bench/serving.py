"""`python -m pdserve.bench.serving`: disaggregated against mixed, on the same machine, under the same router.

Two workers each time: one prefill and one decode, or two mixed. For every workload a sweep of Poisson rates, open loop,
and one closed loop of 16 clients. The objectives are set from the machine itself: multiples of what one request alone
takes on the mixed topology. Rejected and failed requests count in every denominator.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pdserve.bench.load import Outcome, Slo, Workload, percentile, run_closed, run_poisson, summarise

TOPOLOGIES = {"disaggregated": ("--prefill", "1", "--decode", "1"), "mixed": ("--mixed", "2")}
WORKLOADS = (
    Workload("512 in, 64 out", 512, 64),
    Workload("1024 in, 32 out", 1024, 32),
    Workload("128 in, 128 out", 128, 128),
)
RATES_RPS = (1.0, 2.0, 3.0, 4.0)
TTFT_SCALE, TPOT_SCALE = 8.0, 2.5
_READY_S = 300.0
_HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Server:
    """A running `pdserve up`."""

    pid: int
    port: int


@contextlib.contextmanager
def serving(topology: tuple[str, ...], log: Path) -> Iterator[Server]:
    """`pdserve up` with this topology while entered."""
    with socket.create_server((_HOST, 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "pdserve.cli", "up", "--host", _HOST, "--port", str(port), *topology]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline_s = time.monotonic() + _READY_S
        while not _ready(port):
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise SystemExit(f"the server did not become ready: see {log}")
            time.sleep(0.2)
        yield Server(process.pid, port)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(15)


def _ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{_HOST}:{port}/readyz", timeout=1) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def alone(port: int, workload: Workload) -> tuple[float, float]:
    """TTFT and TPOT in seconds of one request at a time; medians of three after one to warm up."""
    outcomes, _ = asyncio.run(run_closed(_HOST, port, workload, 1, 4, seed=7))
    return percentile([o.ttft_s for o in outcomes[1:]], 0.5), percentile([o.tpot_s for o in outcomes[1:]], 0.5)


def measure(port: int, slos: dict[str, Slo], rates_rps: tuple[float, ...], num_requests: int) -> dict[str, object]:
    """The sweep and the closed loop of one topology, by workload."""
    results: dict[str, object] = {}
    for workload in WORKLOADS:
        slo = slos[workload.name]
        sweep = []
        for seed, rate_rps in enumerate(rates_rps, start=100):  # prompts of their own, or they would be cached
            outcomes, elapsed_s = asyncio.run(run_poisson(_HOST, port, workload, rate_rps, num_requests, seed))
            sweep.append({"rate_rps": rate_rps, **_rounded(outcomes, slo, elapsed_s)})
        outcomes, elapsed_s = asyncio.run(run_closed(_HOST, port, workload, 16, 3 * 16, seed=13))
        results[workload.name] = {"sweep": sweep, "closed_16": _rounded(outcomes, slo, elapsed_s)}
    return results


def _rounded(outcomes: list[Outcome], slo: Slo, elapsed_s: float) -> dict[str, float]:
    return {name: round(value, 4) for name, value in summarise(outcomes, slo, elapsed_s).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", default=",".join(map(str, RATES_RPS)), help="requests a second, comma-separated")
    parser.add_argument("--requests", type=int, default=40, help="per rate")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--log-dir", type=Path, default=Path("/tmp"))
    args = parser.parse_args()
    rates_rps = tuple(float(rate) for rate in args.rates.split(","))
    slos: dict[str, Slo] = {}
    report: dict[str, object] = {}
    # Mixed first: it sets the objectives.
    for name in ("mixed", "disaggregated"):
        with serving(TOPOLOGIES[name], args.log_dir / f"bench-{name}.log") as server:
            for workload in WORKLOADS:
                ttft_s, tpot_s = alone(server.port, workload)
                report[f"{name}, {workload.name}, alone"] = {"ttft_s": round(ttft_s, 4), "tpot_s": round(tpot_s, 4)}
                slos.setdefault(workload.name, Slo(TTFT_SCALE * ttft_s, TPOT_SCALE * tpot_s))
            report[name] = measure(server.port, slos, rates_rps, args.requests)
    report["slo"] = {
        name: {"ttft_s": round(slo.ttft_s, 3), "tpot_s": round(slo.tpot_s, 4)} for name, slo in slos.items()
    }
    text = json.dumps(report, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
