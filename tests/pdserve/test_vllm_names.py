"""vLLM's names show the values of our own metrics, with vLLM's labels and types."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from pdserve.timeline import Timeline
from pdserve.vllm_names import ROUTER, WORKER, Same, VllmNames
from pdserve.worker.metrics import WorkerMetrics
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
    assert found[key("vllm:request_queue_time_seconds_sum")] == 0.1
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
    found = scraped(metrics.registry)
    assert found[key("vllm:num_requests_waiting")] == 3
    assert found[key("vllm:num_requests_running")] == 2
    assert found[key("vllm:kv_cache_usage_perc")] == 0.25


def test_all_of_ours_exist() -> None:
    """A metric that is renamed here would vanish there without a word."""
    registry = CollectorRegistry()
    RouterMetrics(registry)
    ours = {metric.name for registry in (registry, WorkerMetrics("mixed").registry) for metric in registry.collect()}
    by_fleet = {"pdserve_router_active_requests"}
    assert {same.ours for same in (*ROUTER, *WORKER)} <= ours | by_fleet


def test_buckets_hold_those_of_vllm() -> None:
    """Its queries ask for an exact `le`."""
    registry = CollectorRegistry()
    RouterMetrics(registry)
    registry.register(VllmNames(registry, [Same("vllm:x", "pdserve_ttft_seconds")], "m"))
    edges = {float(dict(labels)["le"]) for name, labels in scraped(registry) if name == "vllm:x_bucket"}
    assert {0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0} <= edges
