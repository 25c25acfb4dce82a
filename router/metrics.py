"""Prometheus metrics of the router, fed from a request's `Timeline` once, at its end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Info

from pdserve import __version__
from pdserve.timeline import HANDOFF_STAGES, TTFT_STAGES, Timeline
from router.histogram import Histogram

# Each is a superset of vLLM's buckets for the same quantity, so that queries for an exact `le` find it. In seconds:
TTFT_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
E2E_BUCKETS_S = (
    *(0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
# From a decision to a wait for the first token, which vLLM has in the buckets of whole requests.
STAGE_BUCKETS_S = tuple(sorted({0.0001, 0.0002, 0.0005, 0.002, *TTFT_BUCKETS_S, *E2E_BUCKETS_S}))
TOKENS_BUCKETS = tuple(step * 10**power for power in range(6) for step in (1, 2, 5))
_EXEMPLAR_CHARACTERS = 128 - len("request_id")  # OpenMetrics allows so many for names and values together


class RouterMetrics:
    """
    Attributes:
        registry: where the metrics live; /metrics shows all of it.
        requests_in_flight: requests inside the front now, bounded by its limit.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        # The children that were asked for before, as looking one up costs more than counting.
        self._by_outcome: dict[tuple[str, str], Counter] = {}
        self._by_tier: dict[str, Counter] = {}
        Info("pdserve_build", "Version of this process.", registry=registry).info(
            {"version": __version__, "role": "router"}
        )
        self.requests_in_flight = Gauge("pdserve_requests_in_flight", "Requests being answered.", registry=registry)
        self._requests = Counter(
            "pdserve_requests_total",
            "Requests by endpoint and outcome: finish reason, abort (client gone), or HTTP status of the error.",
            ("endpoint", "outcome"),
            registry=registry,
        )
        self._prompt_tokens = Counter("pdserve_prompt_tokens_total", "Tokens of prompts.", registry=registry)
        self._cached_tokens = Counter(
            "pdserve_cached_tokens_total",
            "Tokens of prompts that were not computed, by the tier they were found in.",
            ("tier",),
            registry=registry,
        )
        self._output_tokens = Counter("pdserve_output_tokens_total", "Tokens generated.", registry=registry)
        self._ttft = Histogram(registry, "pdserve_ttft_seconds", "Receipt to first token.", TTFT_BUCKETS_S)
        self._tpot = Histogram(registry, "pdserve_tpot_seconds", "Mean gap after the first token.", TOKEN_BUCKETS_S)
        self._itl = Histogram(
            registry,
            "pdserve_itl_seconds",
            "Gap between deliveries to the client; tokens that arrive together are one delivery.",
            TOKEN_BUCKETS_S,
        )
        self._e2e = Histogram(registry, "pdserve_e2e_seconds", "Receipt to last token.", E2E_BUCKETS_S)
        self._inference = Histogram(
            registry, "pdserve_inference_seconds", "Turn in the router's queue to last token.", E2E_BUCKETS_S
        )
        self._decode = Histogram(registry, "pdserve_decode_seconds", "First token to last token.", E2E_BUCKETS_S)
        self._handoff = Histogram(
            registry, "pdserve_handoff_seconds", "First token to second, if decode took over.", TTFT_BUCKETS_S
        )
        self._request_prompt_tokens = Histogram(
            registry, "pdserve_request_prompt_tokens", "Tokens of a request's prompt.", TOKENS_BUCKETS
        )
        self._request_output_tokens = Histogram(
            registry, "pdserve_request_output_tokens", "Tokens generated for a request.", TOKENS_BUCKETS
        )
        ttft_stage = Histogram(
            registry, "pdserve_ttft_stage_seconds", "Stages that sum to the TTFT.", STAGE_BUCKETS_S, "stage"
        )
        self._ttft_stage = {stage: ttft_stage.of(stage) for stage in TTFT_STAGES}
        handoff_stage = Histogram(
            registry,
            "pdserve_handoff_stage_seconds",
            "Stages that sum to the gap between the first and the second token.",
            STAGE_BUCKETS_S,
            "stage",
        )
        self._handoff_stage = {stage: handoff_stage.of(stage) for stage in HANDOFF_STAGES}

    def count_request(self, endpoint: str, outcome: str) -> None:
        child = self._by_outcome.get((endpoint, outcome))
        if child is None:
            child = self._by_outcome[endpoint, outcome] = self._requests.labels(endpoint, outcome)
        child.inc()

    def observe_generation(
        self,
        timeline: Timeline,
        *,
        prompt_tokens: int,
        cached_by_tier: Mapping[str, int],
        gaps_s: Iterable[float],
        request_id: str = "",
    ) -> None:
        """A generation ended, for whatever reason.

        Args:
            gaps_s: seconds between deliveries to the client.
            request_id: the exemplar of what it took, under which `/v1/requests/{id}/explain` tells why.
        """
        exemplar = {"request_id": request_id} if 0 < len(request_id) <= _EXEMPLAR_CHARACTERS else None
        self._prompt_tokens.inc(prompt_tokens)
        for tier, tokens in cached_by_tier.items():
            child = self._by_tier.get(tier)
            if child is None:
                child = self._by_tier[tier] = self._cached_tokens.labels(tier)
            child.inc(tokens)
        self._output_tokens.inc(timeline.output_tokens)
        if timeline.ttft_s is not None:
            self._ttft.observe(timeline.ttft_s, exemplar)
        if timeline.last_token_s is not None and timeline.first_token_s is not None:
            self._e2e.observe(timeline.last_token_s - timeline.received_s, exemplar)
            self._decode.observe(timeline.last_token_s - timeline.first_token_s)
            if timeline.dispatched_s is not None:
                self._inference.observe(timeline.last_token_s - timeline.dispatched_s)
            self._request_prompt_tokens.observe(prompt_tokens)
            self._request_output_tokens.observe(timeline.output_tokens)
        if timeline.tpot_s is not None:
            self._tpot.observe(timeline.tpot_s)
        for gap_s in gaps_s:
            self._itl.observe(gap_s)
        for stage, seconds in timeline.ttft_stages().items():
            self._ttft_stage[stage].observe(seconds)
        handoff = timeline.handoff_stages()
        if handoff:
            self._handoff.observe(sum(handoff.values()))
        for stage, seconds in handoff.items():
            self._handoff_stage[stage].observe(seconds)
