"""The names that vLLM gives to what we measure too, for autoscalers, endpoint pickers and dashboards made for it.

Read when Prometheus asks, from the metrics under our own names: nothing is counted twice, a step pays nothing. Colons
break the naming rule for exporters, so `promtool check metrics` complains of these names and of no others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample


@dataclass(frozen=True, slots=True)
class Same:
    """One of vLLM's metrics: that of ours which it equals, and the series of it that count.

    Attributes:
        name: as vLLM scrapes it, without the suffixes of its type.
        labels: a series counts if each of these has one of the values.
        kept: label of vLLM to label of ours, taken over.
    """

    name: str
    ours: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)


ROUTER = (
    Same("vllm:time_to_first_token_seconds", "pdserve_ttft_seconds"),
    Same("vllm:inter_token_latency_seconds", "pdserve_itl_seconds"),
    Same("vllm:request_time_per_output_token_seconds", "pdserve_tpot_seconds"),
    Same("vllm:e2e_request_latency_seconds", "pdserve_e2e_seconds"),
    Same("vllm:request_queue_time_seconds", "pdserve_queue_seconds"),
    Same("vllm:request_prefill_time_seconds", "pdserve_ttft_stage_seconds", {"stage": ("compute",)}),
    Same("vllm:request_decode_time_seconds", "pdserve_decode_seconds"),
    Same("vllm:request_inference_time_seconds", "pdserve_inference_seconds"),
    Same("vllm:request_prompt_tokens", "pdserve_request_prompt_tokens"),
    Same("vllm:request_generation_tokens", "pdserve_request_output_tokens"),
    Same("vllm:prompt_tokens", "pdserve_prompt_tokens"),
    Same("vllm:generation_tokens", "pdserve_output_tokens"),
    Same("vllm:prefix_cache_queries", "pdserve_prompt_tokens"),
    Same("vllm:prefix_cache_hits", "pdserve_cached_tokens"),
    Same("vllm:request_success", "pdserve_requests", {"outcome": ("stop", "length")}, {"finished_reason": "outcome"}),
    Same("vllm:num_requests_running", "pdserve_router_active_requests"),
    Same("vllm:num_requests_waiting", "pdserve_queue_requests"),
)
WORKER = (
    Same("vllm:num_requests_waiting", "pdserve_sequences", {"state": ("waiting",)}),
    Same("vllm:num_requests_running", "pdserve_sequences", {"state": ("running",)}),
    Same("vllm:kv_cache_usage_perc", "pdserve_kv_usage_ratio"),
    Same("vllm:cache_config", "pdserve_kv_pool", kept={"block_size": "block_size", "num_gpu_blocks": "num_blocks"}),
    Same("vllm:num_preemptions", "pdserve_preempted_sequences"),
    Same("vllm:nixl_xfer_time_seconds", "pdserve_transfer_seconds"),
    Same("vllm:nixl_bytes_transferred", "pdserve_transfer_size_bytes"),
    Same("vllm:nixl_num_failed_transfers", "pdserve_transfer_failures"),
    Same("vllm:nixl_num_kv_expired_reqs", "pdserve_transfer_failures", {"reason": ("expired",)}),
)


class VllmNames(Collector):
    """Collects `same` anew from `registry`, with vLLM's labels `model_name` and `engine`."""

    def __init__(self, registry: CollectorRegistry, same: Iterable[Same], model_name: str) -> None:
        self._registry = registry
        self._same = tuple(same)
        self._labels = {"model_name": model_name, "engine": "0"}

    def describe(self) -> Iterable[Metric]:
        """Nothing: else the registry would collect us, and we it, to learn our names."""
        return ()

    def collect(self) -> Iterator[Metric]:
        found: dict[str, Metric] = {}
        for collector in list(self._registry._collector_to_names):  # restricted_registry goes by series, not by metric
            if collector is not self:
                found.update((metric.name, metric) for metric in collector.collect())
        for same in self._same:
            if same.ours in found:
                yield self._renamed(same, found[same.ours])

    def _renamed(self, same: Same, ours: Metric) -> Metric:
        metric = Metric(same.name, f"As {ours.name}. {ours.documentation}", ours.type)
        sums: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        for sample in ours.samples:
            if sample.name.endswith("_created") or not _counts(sample.labels, same):
                continue
            labels = {**self._labels, **{theirs: sample.labels[name] for theirs, name in same.kept.items()}}
            if "le" in sample.labels:
                labels["le"] = sample.labels["le"]
            key = (same.name + sample.name.removeprefix(ours.name), tuple(labels.items()))
            sums[key] = sums.get(key, 0.0) + sample.value  # over the labels that vLLM does not have
        metric.samples += [Sample(name, dict(labels), value) for (name, labels), value in sums.items()]
        return metric


def _counts(labels: Mapping[str, str], same: Same) -> bool:
    kept = all(name in labels for name in same.kept.values())
    return kept and all(labels.get(name) in values for name, values in same.labels.items())
