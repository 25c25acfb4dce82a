"""`python -m pdserve.bench.metrics`: what metrics cost a decode step, and how long a worker's scrape takes.

The cost is that of `WorkerMetrics.on_step` over the whole step that it follows, both on the same thread's CPU time. The
scrape is the page as the admin port makes it, of a worker in use whose series are brought up to 1,000 by more peers.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from prometheus_client import generate_latest

from kvstore.pool import PoolEvents
from kvstore.store.tier import Tier
from pdserve import vllm_names
from pdserve.bench.engine import CONTEXT, add, step
from pdserve.bench.result import tell
from pdserve.engine.engine import Engine
from pdserve.launch.folders import cache_folder
from pdserve.models.default_model import ensure_default_model
from pdserve.protocol import worker_pb2 as pb
from pdserve.vllm_names import VllmNames
from pdserve.worker.build import build_engine
from pdserve.worker.config import Role, WorkerConfig
from pdserve.worker.engine_thread import Load, StepReport
from pdserve.worker.link_metrics import LinkCollector
from pdserve.worker.metrics import WorkerMetrics

SERIES = 1000


def in_use() -> tuple[WorkerMetrics, list[pb.LinkReport]]:
    """Metrics in which everything has happened once, and the links that they show."""
    metrics = WorkerMetrics("decode")
    links: list[pb.LinkReport] = []
    metrics.registry.register(LinkCollector(lambda: links))
    metrics.registry.register(VllmNames(metrics.registry, vllm_names.WORKER, "bench"))
    metrics.set_pool(pb.WorkerHello(block_size=16, num_blocks=1024, block_bytes=1 << 18))
    metrics.on_received(0.01, 1 << 20)
    metrics.on_load(list(Tier), 1 << 18, 0.01)
    for reason in ("push", "receive", "expired"):
        metrics.transfer_failures.labels(reason)
    return metrics, links


def num_series(page: bytes) -> int:
    return sum(not line.startswith(b"#") for line in page.splitlines())


def median_us(call: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        began_s = time.thread_time()
        call()
        times.append(time.thread_time() - began_s)
    return statistics.median(times) * 1e6


def decode_us(engine: Engine, batch: int, rounds: int) -> float:
    sequences = [add(engine, f"metrics {batch}/{i}", CONTEXT, rounds + 16) for i in range(batch)]
    while not all(sequence.decoding for sequence in sequences):
        step(engine)
    took_us = median_us(lambda: step(engine), rounds)
    for sequence in sequences:
        engine.finish(sequence)
    engine.pool.clear_cached()
    return took_us


def report(batch: int) -> StepReport:
    """Of a decode step."""
    load = Load(0, batch, 0, batch * CONTEXT, 100, preempted=0)
    return StepReport((), (), (), PoolEvents((), ()), (), load, num_tokens=batch, prefill_tokens=0, step_s=0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    folder = ensure_default_model(cache_folder(), lambda text, share: None)
    config = WorkerConfig(role=Role.MIXED, worker_id="bench", model=folder, kv_bytes=1 << 30, max_model_len=4096)
    engine = build_engine(config, lambda text: None).engine
    metrics, links = in_use()
    result: dict[str, object] = {}
    for batch in (1, 16):
        of_step = report(batch)
        step_us = decode_us(engine, batch, args.rounds)
        cost_us = median_us(lambda of_step=of_step: metrics.on_step(of_step), 100 * args.rounds)  # type: ignore[misc]
        result[f"decode_batch_{batch}"] = {
            "step_us": round(step_us),
            "metrics_us": round(cost_us, 1),
            "of_step": round(cost_us / step_us, 5),
        }
    result["series_in_use"] = num_series(generate_latest(metrics.registry))
    while num_series(generate_latest(metrics.registry)) < SERIES:
        links.append(pb.LinkReport(peer_id=f"decode-{len(links)}", up=True, transport="tcp", bytes_per_second=1e9))
    page_us = median_us(lambda: generate_latest(metrics.registry), 10 * args.rounds)
    result["scrape"] = {"series": SERIES, "ms": round(page_us / 1e3, 2), "of_20_ms": round(page_us / 2e4, 3)}
    tell(result, args.json)


if __name__ == "__main__":
    main()
