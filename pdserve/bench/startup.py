"""`python -m pdserve.bench.startup`: seconds from `pdserve up` to ready, and the memory of each process.

Warm: packages, model, packed weights and kernels are in place. `--cold` gives it an empty cache, so it fetches and
converts the model and builds the kernels first. Memory is taken after one request; in the proportional set size shared
pages, such as the weights, count once, divided among those that map them.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import urllib.request
from pathlib import Path

from pdserve.bench.deployment import TOPOLOGIES, Deployment, deployed
from pdserve.bench.result import tell

_PROMPT_TOKENS, _OUTPUT_TOKENS = 512, 8


def memory_mib(pid: int) -> dict[str, int]:
    """Proportional, resident and private dirty memory."""
    fields = {"Pss": "pss_mib", "Rss": "rss_mib", "Private_Dirty": "private_dirty_mib"}
    found: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        name = line.split(":")[0]
        if name in fields:
            found[fields[name]] = int(line.split()[1]) // 1024
    return found


def descendants(pid: int) -> dict[str, int]:
    """Process ids by what they run: the supervisor's children."""
    found: dict[str, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
            words = (stat.parent / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue  # it has just ended
        if parent == pid:
            if "--worker-id" in words:
                name = words[words.index("--worker-id") + 1]
            else:
                name = words[2] if "-m" in words else (stat.parent / "comm").read_text().strip()
            found[name] = int(stat.parent.name)
    return found


def complete_one(server: Deployment) -> None:
    """Raises OSError if it is not answered."""
    with urllib.request.urlopen(f"{server.url}/v1/models", timeout=10) as response:
        model = json.load(response)["data"][0]["id"]
    prompt = list(range(1_000, 1_000 + _PROMPT_TOKENS))
    body = {"model": model, "prompt": prompt, "max_tokens": _OUTPUT_TOKENS, "ignore_eos": True}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        response.read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cold", action="store_true", help="with an empty model and kernel cache")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if args.cold:
            os.environ["PDSERVE_CACHE"] = scratch
        began_s = time.monotonic()
        with deployed(TOPOLOGIES["disaggregated"], Path(scratch) / "up.log") as server:
            ready_s = time.monotonic() - began_s
            complete_one(server)
            processes = {"supervisor": server.pid, **descendants(server.pid)}
            memory = {name: memory_mib(pid) for name, pid in processes.items()}
    tell({"cold": args.cold, "ready_s": round(ready_s, 1), "memory": memory}, args.json)


if __name__ == "__main__":
    main()
