"""Goodput of two workers that share the device: both mixed, or one prefill and one decode, each a process of its own.

Without MPS two processes take turns on a GPU, they do not overlap: disaggregation can win here only by what never
stands in one batch, not by hardware of its own. The load and the search are those of `python -m loadtest sweep`.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdserve.bench.gpu.drive import Setup
from pdserve.bench.gpu.shapes import SHAPES, write_shape

_LIMIT_S = 560.0  # of one load, both ways
_STOP_S = 30.0
_NEEDED = ("loadtest", "matplotlib", "jinja2", "httptools", "msgspec")


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked, the objectives, and the rate to begin with on a GPU."""

    workload: tuple[str, ...]
    ttft_s: float
    tpot_s: float
    first_rps: float


def goodput(setup: Setup) -> dict[str, object]:
    """Lengths as ShareGPT's: short prompts, long answers; a token every 25 ms is faster than anyone reads."""
    return _swept(setup, Load(("--workload", "sharegpt"), ttft_s=0.25, tpot_s=0.025, first_rps=8.0))


def goodput_long(setup: Setup) -> dict[str, object]:
    """Long prompts, short answers: 8,192 in, or half of what the model takes, and 128 out."""
    longest = SHAPES[setup.shape]["max_position_embeddings"]
    assert isinstance(longest, int)
    workload = ("--prompt-tokens", str(min(8192, longest // 2)), "--output-tokens", "128")
    return _swept(setup, Load(workload, ttft_s=2.0, tpot_s=0.025, first_rps=1.0))


def _swept(setup: Setup, load: Load) -> dict[str, object]:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return {
            "skipped": f"{', '.join(missing)} cannot be imported: requirements/loadtest.txt has what the load needs"
        }
    folder = setup.scratch / "goodput"
    folder.mkdir(exist_ok=True)
    # One point shows on the CPU that all of it works.
    first_rps, points, point_s = (load.first_rps, 4, 20.0) if setup.device.type == "cuda" else (2.0, 1, 3.0)
    command = [
        sys.executable,
        "-m",
        "loadtest",
        "sweep",
        "mixed",
        "disaggregated",
        "--out",
        str(folder),
        *load.workload,
    ]
    values = {"--rate": first_rps, "--points": points, "--point": point_s, "--ttft": load.ttft_s, "--tpot": load.tpot_s}
    command += [str(part) for pair in values.items() for part in pair]
    _run([*command, "--up", shlex.join(_up_options(setup))], folder)
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return {
        "workload": report["workload"],
        "slo": report["slo"],
        "verdict": report["verdict"],
        "settings": report["settings"],
        **{result["name"]: _brief(result) for result in report["results"]},
    }


def _up_options(setup: Setup) -> tuple[str, ...]:
    """No store: every prompt is new, so that it could only cost."""
    model = write_shape(setup.shape, setup.scratch / setup.shape)
    options = ["--model", str(model), "--load-format", "dummy", "--dtype", setup.dtype, "--host-bytes", "0"]
    if setup.kv_bytes is not None:
        options += ["--kv-bytes", str(setup.kv_bytes)]
    worker = ("--device", str(setup.device), "--max-batched-tokens", "2048", "--transport", setup.transport)
    return (*options, "--", *worker)


def _run(command: Sequence[str], folder: Path) -> None:
    """Raises RuntimeError with the end of what it said. Told to end it stops the servers, which a kill would not."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            said, _ = process.communicate(timeout=_LIMIT_S)
        except BaseException:
            process.terminate()
            process.wait(_STOP_S)
            raise
    if process.returncode != 0:
        logs = "".join(f"\n{log.name}: {log.read_text()[-2000:]}" for log in folder.glob("*.log"))
        raise RuntimeError(f"the load ended with {process.returncode}: {said.strip()[-2000:]}{logs}")


def _brief(result: Mapping[str, Any]) -> dict[str, object]:
    """Of one way to share the work: the highest rate that held, and what was seen at each."""
    shown = [
        *("rate_rps", "requests", "failed", "errors", "good_share", "ttft_share", "tpot_share"),
        *("output_tokens_per_s", "longest_gaps_s", "stages_s", "handoff_s"),
    ]
    points = [
        {name: point[name] for name in shown}
        | {f"{name}_p50_s": point[name]["p50_s"] for name in ("ttft", "tpot")}
        | {f"{name}_p99_s": point[name]["p99_s"] for name in ("ttft", "tpot")}
        for point in result["points"]
    ]
    return {"best_rps": result["best_rps"], "alone": result["alone"], "points": points}
