"""`python -m pdserve.bench.samples`: one request with n=8 against 8 requests, of one prompt and of their own.

Over HTTP against `pdserve up`, in turn, with new prompts each time: seconds to the last token, tokens that the workers
computed, and the most blocks that sequences held at once, over all workers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from pdserve.bench.deployment import TOPOLOGIES, Deployment, deployed
from pdserve.bench.result import tell

N = 8
_COMPUTED = "pdserve_computed_tokens_total"


def fetch(url: str, body: dict[str, Any] | None = None) -> bytes:
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, content, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        return bytes(response.read())


class Watch:
    """What the workers of a deployment compute and hold while entered."""

    def __init__(self, server: Deployment) -> None:
        self._server = server
        workers = json.loads(fetch(f"{server.url}/workers"))["workers"]
        self._pages = [f"http://{worker['admin_address']}/metrics" for worker in workers]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.computed_tokens = 0
        self.held_blocks = 0

    def __enter__(self) -> Watch:
        self.computed_tokens = -self._computed()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.computed_tokens += self._computed()

    def _computed(self) -> int:
        families = [family for page in self._pages for family in text_string_to_metric_families(fetch(page).decode())]
        return sum(int(s.value) for family in families for s in family.samples if s.name == _COMPUTED)

    def _look(self) -> None:
        while not self._ended.wait(0.02):
            workers = json.loads(fetch(f"{self._server.url}/v1/pools"))["workers"]
            self.held_blocks = max(self.held_blocks, sum(worker["by_state"].get("held", 0) for worker in workers))


def measure(server: Deployment, bodies: list[dict[str, Any]]) -> dict[str, float]:
    with Watch(server) as watch, ThreadPoolExecutor(len(bodies)) as pool:
        began_s = monotonic()
        list(pool.map(lambda body: fetch(f"{server.url}/v1/completions", body), bodies))
        took_s = monotonic() - began_s
    return {"s": took_s, "computed_tokens": watch.computed_tokens, "held_blocks": watch.held_blocks}


def cases(model: str, prompt_tokens: int, output_tokens: int) -> dict[str, Callable[[int], list[dict[str, Any]]]]:
    """By name: the requests of a turn, sent at once."""
    common = {"model": model, "max_tokens": output_tokens, "ignore_eos": True, "temperature": 1.0, "seed": 1}

    def body(salt: int, **more: Any) -> dict[str, Any]:
        return common | {"prompt": [100 + (salt * 7919 + i * i) % 40_000 for i in range(prompt_tokens)]} | more

    return {
        "n=8": lambda turn: [body(100 * turn, n=N)],
        "8 requests, one prompt": lambda turn: [body(100 * turn + 10, seed=1 + i) for i in range(N)],
        "8 requests, own prompts": lambda turn: [body(100 * turn + 20 + i) for i in range(N)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = {"prompt_tokens": args.prompt_tokens, "output_tokens": args.output_tokens}
    for name, options in TOPOLOGIES.items():
        found: dict[str, list[dict[str, float]]] = {}
        log = Path(tempfile.gettempdir()) / f"pdserve-bench-samples-{name}.log"
        with deployed((*options, "--host-bytes", "0"), log) as server:
            model = json.loads(fetch(f"{server.url}/v1/models"))["data"][0]["id"]
            turns = cases(model, args.prompt_tokens, args.output_tokens)
            measure(server, turns["n=8"](99))  # first calls
            for turn in range(args.repeat):
                for case, bodies in turns.items():
                    found.setdefault(case, []).append(measure(server, bodies(turn)))
        medians = {
            case: {key: round(statistics.median(each[key] for each in values), 2) for key in values[0]}
            for case, values in found.items()
        }
        best = medians["n=8"]["s"]
        result[name] = {case: {**each, "of_n_8": round(each["s"] / best, 2)} for case, each in medians.items()}
    tell(result, args.json)


if __name__ == "__main__":
    main()
