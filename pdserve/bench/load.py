"""A small open-loop load generator: Poisson arrivals, streamed completions, and what each request experienced.

Prompts are token ids, so that lengths are exact. Written on plain asyncio streams: on a small machine the client shares
the cores with what it measures.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests of one shape. Prompts are random, hence share no prefix."""

    name: str
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Slo:
    """A request is good if it meets both, in seconds."""

    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request as its client saw it; `gaps_s` are between chunks of the stream."""

    status: int
    ttft_s: float
    tpot_s: float
    gaps_s: tuple[float, ...]
    output_tokens: int
    e2e_s: float

    @property
    def ok(self) -> bool:
        return self.status == 200 and self.output_tokens > 0

    def good(self, slo: Slo) -> bool:
        return self.ok and self.ttft_s <= slo.ttft_s and self.tpot_s <= slo.tpot_s


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest-rank percentile; NaN of nothing."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def summarise(outcomes: Sequence[Outcome], slo: Slo, elapsed_s: float) -> dict[str, float]:
    """Rejected and failed requests count in every denominator."""
    ok = [outcome for outcome in outcomes if outcome.ok]
    gaps = [gap for outcome in ok for gap in outcome.gaps_s]
    good = sum(outcome.good(slo) for outcome in outcomes)
    return {
        "requests": len(outcomes),
        "failed": len(outcomes) - len(ok),
        "good_share": good / max(len(outcomes), 1),
        "goodput_rps": good / elapsed_s,
        "ttft_met_share": sum(o.ok and o.ttft_s <= slo.ttft_s for o in outcomes) / max(len(outcomes), 1),
        "tpot_met_share": sum(o.ok and o.tpot_s <= slo.tpot_s for o in outcomes) / max(len(outcomes), 1),
        "output_tokens_per_s": sum(outcome.output_tokens for outcome in ok) / elapsed_s,
        "ttft_p50_s": percentile([o.ttft_s for o in ok], 0.5),
        "ttft_p99_s": percentile([o.ttft_s for o in ok], 0.99),
        "tpot_p50_s": percentile([o.tpot_s for o in ok], 0.5),
        "tpot_p99_s": percentile([o.tpot_s for o in ok], 0.99),
        "itl_p50_s": percentile(gaps, 0.5),
        "itl_p99_s": percentile(gaps, 0.99),
        "elapsed_s": elapsed_s,
    }


async def complete(host: str, port: int, workload: Workload, seed: int, timeout_s: float = 120.0) -> Outcome:
    """One streamed completion with a random prompt."""
    rng = random.Random(f"{workload.name} {seed}")  # else a shorter prompt would be the prefix of a longer one
    body = json.dumps(
        {
            "model": "SmolLM2-135M-Instruct",
            "prompt": [rng.randrange(100, 40_000) for _ in range(workload.prompt_tokens)],
            "max_tokens": workload.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    began_s = time.monotonic()
    arrivals: list[float] = []
    status, tokens = 0, 0
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
                writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
                status = int((await reader.readline()).split()[1])
                async for line in reader:
                    if not line.startswith(b"data: {"):
                        continue
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        status = 599
                    elif chunk["choices"]:
                        arrivals.append(time.monotonic())
                    elif chunk.get("usage"):
                        tokens = chunk["usage"]["completion_tokens"]
            finally:
                writer.close()
    except (OSError, TimeoutError, ValueError, IndexError):
        status = status if status != 200 else 598
    if not arrivals:
        return Outcome(status, float("inf"), float("inf"), (), 0, time.monotonic() - began_s)
    gaps = tuple(later - earlier for earlier, later in pairwise(arrivals))
    tpot_s = (arrivals[-1] - arrivals[0]) / max(tokens - 1, 1)
    return Outcome(status, arrivals[0] - began_s, tpot_s, gaps, tokens, arrivals[-1] - began_s)


async def run_poisson(
    host: str, port: int, workload: Workload, rate_rps: float, num_requests: int, seed: int
) -> tuple[list[Outcome], float]:
    """`num_requests` at a mean rate, whatever the server does; returns the outcomes and the seconds it took."""
    rng = random.Random(seed)
    began_s = time.monotonic()
    due_s = 0.0
    tasks = []
    for number in range(num_requests):
        await asyncio.sleep(max(0.0, began_s + due_s - time.monotonic()))
        tasks.append(asyncio.create_task(complete(host, port, workload, seed * 100_003 + number)))
        due_s += rng.expovariate(rate_rps)
    outcomes = await asyncio.gather(*tasks)
    return outcomes, time.monotonic() - began_s


async def run_closed(
    host: str, port: int, workload: Workload, concurrency: int, num_requests: int, seed: int
) -> tuple[list[Outcome], float]:
    """`concurrency` clients, each with one request at a time."""
    numbers = iter(range(num_requests))

    async def client() -> list[Outcome]:
        return [await complete(host, port, workload, seed * 100_003 + number) for number in numbers]

    began_s = time.monotonic()
    results = await asyncio.gather(*(client() for _ in range(concurrency)))
    return [outcome for result in results for outcome in result], time.monotonic() - began_s
