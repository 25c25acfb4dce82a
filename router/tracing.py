"""A finished request as OpenTelemetry spans: the server span, and under it the stages that its time was made of.

    generate MODEL   received ────────────────────────────────────────────────────────────> ended
      tokenise │ route │ wait │ fetch │ queue │ compute │ deliver │ reserve │ … │ resume │ decode
               up to the first token                              │ up to the second     │ up to the last

Children touch each other and leave no gap, so their durations sum to the time until the last token. All of it is made
from the timeline when the request has ended; a thread of the SDK exports it. No span holds a prompt or an answer.

The only module that imports opentelemetry (`pdserve[otel]`); the exporter, the sampler and the batches are configured
by the standard OTEL_* variables.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from kvstore import __version__
from pdserve.request import FinishReason
from pdserve.timeline import Timeline
from router.records import Record
from router.routed import RoutedGeneration

_CLOSE_S = 2.0  # for a collector that does not answer, when the router ends
SERVICE = "pdserve-router"  # unless OTEL_SERVICE_NAME says otherwise
_BY_CLIENT = {FinishReason.STOP.value, FinishReason.LENGTH.value, FinishReason.ABORT.value}  # no error of the server


class Tracing:
    def __init__(self, provider: TracerProvider, exporter: SpanExporter, model: str) -> None:
        self._provider = provider
        self._exporter = exporter
        self._tracer = provider.get_tracer("pdserve.router", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._model = model

    @classmethod
    def from_environment(cls, model: str, router_id: str) -> Tracing:
        """Exports over OTLP/HTTP to where OTEL_EXPORTER_OTLP_* say."""
        ours = Resource.create({"service.name": SERVICE, "service.instance.id": router_id})
        provider = TracerProvider(resource=ours.merge(OTELResourceDetector().detect()))
        exporter = OTLPSpanExporter()
        provider.add_span_processor(BatchSpanProcessor(exporter))
        return cls(provider, exporter, model)

    def ended(self, record: Record, generation: RoutedGeneration) -> None:
        """The record is closed. Nothing is made of a request whose client says that its trace is not sampled."""
        wall = _wall_clock()
        timeline = generation.timeline
        server = self._tracer.start_span(
            f"generate {self._model}",
            self._propagator.extract(generation.wishes.trace_context),
            SpanKind.SERVER,
            start_time=wall(timeline.received_s),
        )
        if not server.is_recording():
            return
        server.set_attributes(self._attributes(record, generation))
        if record.end is not None and record.end not in _BY_CLIENT:
            server.set_attribute("error.type", record.end)
            server.set_status(Status(StatusCode.ERROR, record.end))
        inside, start_ns = set_span_in_context(server), wall(timeline.received_s)
        for stage, end_s in stage_ends(timeline):
            end_ns = max(start_ns, wall(end_s))
            if end_ns > start_ns:
                self._tracer.start_span(stage, inside, start_time=start_ns).end(end_ns)
            start_ns = end_ns
        server.end(max(start_ns, wall(time.monotonic())))

    def close(self) -> None:
        """Exports what is left; blocks for a bounded time."""
        gives_up = threading.Timer(_CLOSE_S, self._exporter.shutdown)  # else the SDK tries for half a minute
        gives_up.start()
        self._provider.shutdown()
        gives_up.cancel()

    def _attributes(self, record: Record, generation: RoutedGeneration) -> dict[str, AttributeValue]:
        """Under the names of the semantic conventions where there is one."""
        found: dict[str, AttributeValue] = {
            "gen_ai.request.model": self._model,
            "gen_ai.response.id": record.request_id,
            "gen_ai.usage.input_tokens": record.prompt_tokens,
            "gen_ai.usage.output_tokens": generation.timeline.output_tokens,
            "pdserve.workers": list(generation.workers),
            "pdserve.slo.class": record.slo.name,
            **{f"pdserve.cached_tokens.{tier}": tokens for tier, tokens in generation.cached_by_tier.items()},
        }
        if record.end in _BY_CLIENT:
            found["gen_ai.response.finish_reasons"] = [record.end]
        if record.missed is not None:
            found["pdserve.missed_by"] = record.missed
        return found


def stage_ends(timeline: Timeline) -> list[tuple[str, float]]:
    """Stages in their order, each with its end on the timeline's clock; the last one ends with the last token."""
    at_s, ends = timeline.received_s, []
    for stage, seconds in (*timeline.ttft_stages().items(), *timeline.handoff_stages().items()):
        at_s += seconds
        ends.append((stage, at_s))
    if timeline.last_token_s is not None and timeline.output_tokens > 1:
        ends.append(("decode", timeline.last_token_s))
    return ends


def _wall_clock() -> Callable[[float], int]:
    """Nanoseconds since 1970 of a point in seconds on the monotonic clock, both as they run now."""
    offset_ns = time.time_ns() - time.monotonic_ns()
    return lambda at_s: offset_ns + round(at_s * 1e9)
