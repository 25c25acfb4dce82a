"""What the store does a second, each figure beside memcpy, the disk, the transfer plane or Redis in the same run.

python -m kvstore.store.bench [--only host,prefix,disk,start,remote,index,values] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvstore.store.bench.disk import measure_disk, measure_start
from kvstore.store.bench.host import measure_host, measure_prefix
from kvstore.store.bench.index import measure_index, measure_values
from kvstore.store.bench.processes import redis_server
from kvstore.store.bench.remote import measure_remote

PARTS = ("host", "prefix", "values", "remote", "disk", "start", "index")
BLOCK_KIB = (64, 360, 1024)


async def measure(parts: list[str], folder: Path) -> dict[str, list[Any]]:
    """Results by part."""
    results: dict[str, list[Any]] = {}
    if "host" in parts:
        results["host"] = [await measure_host(folder, kib) for kib in BLOCK_KIB]
    if "prefix" in parts:
        results["prefix"] = [await measure_prefix(folder)]
    if "disk" in parts:
        results["disk"] = [await measure_disk(folder)]
    if "start" in parts:
        results["start"] = [await measure_start(folder)]
    with redis_server(folder) as url:
        if url is None:
            return results
        if "values" in parts:
            results["values"] = [await measure_values(url, kib) for kib in BLOCK_KIB]
        if "remote" in parts:
            results["remote"] = [await measure_remote(folder, url, same_host=same_host) for same_host in (True, False)]
        if "index" in parts:
            results["index"] = [await measure_index(url)]
    return results


def _print(results: dict[str, list[Any]]) -> None:
    for part, rows in results.items():
        for row in rows:
            figures = (f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in row)
            print(f"{part:<8}", ", ".join(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the store between processes of this machine.")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--json", type=Path, help="write the results here instead of to standard output")
    arguments = parser.parse_args()
    parts = arguments.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no part is named {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as folder:
        results = asyncio.run(measure(parts, Path(folder)))
    report = json.dumps({part: [asdict(row) for row in rows] for part, rows in results.items()}, indent=1)
    if arguments.json:
        arguments.json.write_text(report + "\n")
    else:
        print(report)
    _print({part: [asdict(row).items() for row in rows] for part, rows in results.items()})


if __name__ == "__main__":
    main()
