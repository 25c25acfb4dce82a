"""vLLM's names show the values of our own metrics, with vLLM's labels and types."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from pdserve.protocol import worker_pb2 as pb
from pdserve.timeline import Timeline
from pdserve.vllm_names import ROUTER, WORKER, VllmNames
from pdserve.worker.metrics import WorkerMetrics
from router.feeder import wait_histogram
from router.metrics import RouterMetrics

LABELS = {"model_name": "m", "engine": "0"}


def scraped(registry: CollectorRegistry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = generate_latest(registry).decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    found = {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in samples}
    assert len(found) == len(samples), "a series is there twice"
    return found


def key(name: str, **labels: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    return name, tuple(sorted({**LABELS, **labels}.items()))


def test_router() -> None:
    registry = CollectorRegistry()
    metrics = RouterMetrics(registry)
    registry.register(VllmNames(registry, ROUTER, "m"))
    timeline = Timeline(received_s=0.0, tokenised_s=0.01, dispatched_s=0.02, reported={"queue": 0.1, "compute": 0.2})
    timeline.token(0.5)
    timeline.token(0.75)
    metrics.observe_generation(timeline, prompt_tokens=10, cached_by_tier={"device": 3, "host": 1}, gaps_s=[0.25])
    for endpoint, outcome in (("chat", "stop"), ("completions", "stop"), ("chat", "length"), ("chat", "502")):
        metrics.count_request(endpoint, outcome)
    found = scraped(registry)
    assert found[key("vllm:time_to_first_token_seconds_sum")] == 0.5
    assert found[key("vllm:time_to_first_token_seconds_bucket", le="0.25")] == 0
    assert found[key("vllm:time_to_first_token_seconds_bucket", le="0.5")] == 1
    assert found[key("vllm:request_prefill_time_seconds_sum")] == pytest.approx(0.2)
    assert found[key("vllm:request_decode_time_seconds_sum")] == 0.25
    assert found[key("vllm:request_inference_time_seconds_sum")] == pytest.approx(0.73)
    assert found[key("vllm:request_prompt_tokens_sum")] == 10
    assert found[key("vllm:request_generation_tokens_sum")] == 2
    assert found[key("vllm:prefix_cache_queries_total")] == 10
    assert found[key("vllm:prefix_cache_hits_total")] == 4
    assert found[key("vllm:request_success_total", finished_reason="stop")] == 2
    assert found[key("vllm:request_success_total", finished_reason="length")] == 1
    assert not any("502" in str(labels) for name, labels in found if name.startswith("vllm:"))


def test_worker_has_what_endpoint_pickers_read() -> None:
    metrics = WorkerMetrics("decode")
    metrics.registry.register(VllmNames(metrics.registry, WORKER, "m"))
    metrics._sequences.labels("waiting").set(3)
    metrics._sequences.labels("running").set(2)
    metrics._kv_usage.set(0.25)
    metrics.set_pool(pb.WorkerHello(block_size=16, num_blocks=100, block_bytes=4096))
    metrics.on_received(0.03, 5000)
    metrics.transfer_failures.labels("expired").inc()
    metrics.transfer_failures.labels("push").inc()
    found = scraped(metrics.registry)
    assert found[key("vllm:cache_config_info", block_size="16", num_gpu_blocks="100")] == 1
    assert found[key("vllm:nixl_xfer_time_seconds_count")] == 1
    assert found[key("vllm:nixl_bytes_transferred_sum")] == 5000
    assert found[key("vllm:nixl_num_failed_transfers_total")] == 2
    assert found[key("vllm:nixl_num_kv_expired_reqs_total")] == 1
    assert found[key("vllm:num_requests_waiting")] == 3
    assert found[key("vllm:num_requests_running")] == 2
    assert found[key("vllm:kv_cache_usage_perc")] == 0.25


def test_all_of_ours_exist() -> None:
    """A metric that is renamed here would vanish there without a word."""
    registry = CollectorRegistry()
    RouterMetrics(registry)
    ours = {metric.name for registry in (registry, WorkerMetrics("mixed").registry) for metric in registry.collect()}
    by_fleet = {"pdserve_router_active_requests", "pdserve_queue_requests", "pdserve_queue_seconds"}
    assert {same.ours for same in (*ROUTER, *WORKER)} <= ours | by_fleet


# Of vLLM 0.32.
REQUEST = {0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680}
TOKEN = {0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80}
FIRST = {
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
}
TRANSFER = {0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 5}
BUCKETS = {
    "time_to_first_token_seconds": FIRST,
    "inter_token_latency_seconds": TOKEN,
    "request_time_per_output_token_seconds": TOKEN,
    "e2e_request_latency_seconds": REQUEST,
    "request_queue_time_seconds": REQUEST,
    "request_prefill_time_seconds": REQUEST,
    "request_decode_time_seconds": REQUEST,
    "request_inference_time_seconds": REQUEST,
    "request_prompt_tokens": {1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000},
    "nixl_xfer_time_seconds": TRANSFER,
    "nixl_bytes_transferred": {2.0**power for power in range(11, 34, 2)},
}


def test_buckets_hold_those_of_vllm() -> None:
    """Its queries ask for an exact `le`."""
    registry = CollectorRegistry()
    metrics = RouterMetrics(registry)
    waits = wait_histogram()
    registry.register(waits)
    waits.labels("standard").observe(1)
    timeline = Timeline(received_s=0.0, tokenised_s=0.01, dispatched_s=0.02, reported={"compute": 0.2})
    timeline.token(0.5)
    metrics.observe_generation(timeline, prompt_tokens=1, cached_by_tier={}, gaps_s=())
    worker = WorkerMetrics("decode").registry
    edges: dict[str, set[float]] = {}
    for registry_, same in ((registry, ROUTER), (worker, WORKER)):
        registry_.register(VllmNames(registry_, same, "m"))
        for name, labels in scraped(registry_):
            if name.startswith("vllm:") and name.endswith("_bucket"):
                edges.setdefault(name[5:-7], set()).add(float(dict(labels)["le"]))
    assert edges.keys() >= BUCKETS.keys()
    for name, wanted in BUCKETS.items():
        assert wanted <= edges[name], name
