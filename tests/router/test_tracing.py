"""A request's spans: stages in order that sum to its time, the client's trace continued, errors told."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from pdserve.timeline import HANDOFF_STAGES, TTFT_STAGES, Timeline
from router.bench.stub_worker import Fabric, StubSpec, StubWorker
from router.caller import ANYBODY
from router.main import Router, RouterConfig, tracing_of
from router.records import Record
from router.slo import CLASSES, STANDARD
from router.tracing import Tracing
from router.wishes import NO_WISHES, Wishes
from tests.support.stub_cluster import DECODE, GREEDY, PREFILL, StubCluster, collect

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-00"


def spans_of(
    timeline: Timeline, end: str = "stop", missed: str | None = None, traceparent: str = ""
) -> tuple[ReadableSpan | None, list[ReadableSpan]]:
    """The server span, and those under it in the order of their beginning."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    record = Record("r1", "", 40, CLASSES[STANDARD], end=end, missed=missed)
    wishes = replace(NO_WISHES, trace_context={"traceparent": traceparent} if traceparent else {})
    generation = SimpleNamespace(timeline=timeline, wishes=wishes, workers=["p0", "d0"], cached_by_tier={"host": 16})
    Tracing(provider, exporter, "tiny").ended(record, generation)
    spans = sorted(exporter.get_finished_spans(), key=lambda span: (span.start_time, span.end_time))
    server = next((span for span in spans if span.name == "generate tiny"), None)
    return server, [span for span in spans if span is not server]


@st.composite
def timelines(draw: st.DrawFn) -> Timeline:
    """Of any reached point; workers may report durations that do not fit."""
    gaps = draw(st.lists(st.floats(0.0, 100.0), min_size=6, max_size=6))
    points, at_s = [], time.monotonic() - sum(gaps)
    for gap in (0.0, *gaps):
        at_s += gap
        points.append(at_s)
    timeline = Timeline(*points[:4])
    for token_s in points[4 : 4 + draw(st.integers(0, 3))]:
        timeline.token(token_s)
    stages = st.sampled_from(["fetch", "queue", "compute", "reserve", "transfer", "commit"])
    timeline.reported = draw(st.dictionaries(stages, st.floats(-1.0, 200.0)))
    return timeline


@given(timelines())
def test_children_are_in_order_without_a_gap_and_sum_to_the_time_until_the_last_token(timeline: Timeline) -> None:
    server, children = spans_of(timeline)
    assert server is not None
    at_ns = server.start_time
    for child in children:
        assert child.parent is not None
        assert child.parent.span_id == server.context.span_id
        assert child.start_time == at_ns < child.end_time
        at_ns = child.end_time
    assert at_ns <= server.end_time
    last_s = timeline.last_token_s if timeline.last_token_s is not None else timeline.received_s
    assert (at_ns - server.start_time) / 1e9 == pytest.approx(last_s - timeline.received_s, abs=1e-6)
    order = [*TTFT_STAGES, *HANDOFF_STAGES, "decode"]
    assert [child.name for child in children] == sorted((child.name for child in children), key=order.index)
    by_name = {child.name: (child.end_time - child.start_time) / 1e9 for child in children}
    for stage, seconds in (*timeline.ttft_stages().items(), *timeline.handoff_stages().items()):
        assert by_name.get(stage, 0.0) == pytest.approx(seconds, abs=1e-6)


def test_attributes_bear_the_names_of_the_semantic_conventions() -> None:
    timeline = Timeline(time.monotonic() - 1.0)
    timeline.token(time.monotonic(), 3)
    server, _ = spans_of(timeline, end="length", missed="queue")
    assert server is not None
    assert dict(server.attributes) == {
        "gen_ai.request.model": "tiny",
        "gen_ai.response.id": "r1",
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": 40,
        "gen_ai.usage.output_tokens": 3,
        "pdserve.workers": ("p0", "d0"),
        "pdserve.cached_tokens.host": 16,
        "pdserve.slo.class": "standard",
        "pdserve.missed_by": "queue",
    }
    assert server.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize("end", ["worker_failed", "overloaded", "error"])
def test_a_request_that_failed_is_one_span_with_an_error(end: str) -> None:
    server, children = spans_of(Timeline(time.monotonic()), end)
    assert server is not None
    assert not children
    assert (server.status.status_code, server.attributes["error.type"]) == (StatusCode.ERROR, end)
    assert "gen_ai.response.finish_reasons" not in server.attributes


def test_a_client_that_left_is_no_error() -> None:
    server, _ = spans_of(Timeline(time.monotonic()), "abort")
    assert server is not None
    assert server.status.status_code is StatusCode.UNSET


def test_the_clients_trace_goes_on_and_its_sampled_flag_is_kept() -> None:
    timeline = Timeline(time.monotonic())
    server, _ = spans_of(timeline, traceparent=SAMPLED)
    assert server is not None
    assert server.parent is not None
    assert (f"{server.context.trace_id:032x}", f"{server.parent.span_id:016x}") == (TRACE, SPAN)
    assert spans_of(timeline, traceparent=UNSAMPLED) == (None, [])
    for nonsense in ("nonsense", f"00-{'0' * 32}-{SPAN}-01", SAMPLED * 99, "\xff"):
        server, _ = spans_of(timeline, traceparent=nonsense)
        assert server is not None
        assert server.parent is None


def test_headers_name_the_trace() -> None:
    assert not Wishes.from_headers({}, ANYBODY).trace_context
    wishes = Wishes.from_headers({b"traceparent": SAMPLED.encode(), b"tracestate": b"a=b"}, ANYBODY)
    assert wishes.trace_context == {"traceparent": SAMPLED, "tracestate": "a=b"}


class Collector(HTTPServer):
    """What is posted to it, by path."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Post)
        self.posted: list[tuple[str, bytes]] = []


class _Post(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        self.server.posted.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """The test says what came."""


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with Collector() as server:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


async def test_a_collector_receives_a_request_over_otlp(collector: Collector) -> None:
    fabric = Fabric()
    tracing = tracing_of("tiny", "router0")
    assert tracing is not None
    workers = StubWorker(StubSpec("p0", PREFILL), fabric), StubWorker(StubSpec("d0", DECODE), fabric)
    async with StubCluster(*workers) as cluster:
        cluster.dispatcher.account.on_close = tracing.ended
        generation = cluster.start(GREEDY, trace_context={"traceparent": SAMPLED})
        await collect(generation)
        await asyncio.to_thread(tracing.close)
    [(path, body)] = collector.posted
    assert path == "/v1/traces"
    [resource] = ExportTraceServiceRequest.FromString(body).resource_spans
    names = {each.key: each.value.string_value for each in resource.resource.attributes}
    assert (names["service.name"], names["service.instance.id"]) == ("pdserve-router", "router0")
    spans = {span.name: span for scope in resource.scope_spans for span in scope.spans}
    server = spans.pop("generate tiny")
    assert (server.trace_id.hex(), server.parent_span_id.hex()) == (TRACE, SPAN)
    assert {"deliver", "resume", "decode"} <= spans.keys() <= {*TTFT_STAGES, *HANDOFF_STAGES, "decode"}
    assert {span.parent_span_id for span in spans.values()} == {server.span_id}
    values = {each.key: each.value for each in server.attributes}
    assert values["gen_ai.usage.output_tokens"].int_value == GREEDY.max_tokens
    assert [each.string_value for each in values["pdserve.workers"].array_value.values] == ["p0", "d0"]


async def test_a_router_that_is_told_where_hands_its_requests_over(collector: Collector, tmp_path: Path) -> None:
    config = RouterConfig(tmp_path, "127.0.0.1", 0, None, ("127.0.0.1:1",), "test", "cost", drain_s=0.0)
    router = Router(
        config,
        SimpleNamespace(
            name="tiny",
            vocab_size=100,
            eos_token_ids=(),
            created_s=0,
            max_model_len=64,
            tokenizer=None,
            chat_template=None,
        ),
    )
    router.start()
    generation = SimpleNamespace(timeline=Timeline(time.monotonic()), wishes=NO_WISHES, workers=[], cached_by_tier={})
    assert router.dispatcher.account.on_close is not None
    router.dispatcher.account.on_close(Record("r1", "", 40, CLASSES[STANDARD], end="stop"), generation)
    await router.close()
    assert len(collector.posted) == 1


def test_the_environment_may_name_the_service(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "chat")
    tracing = tracing_of("tiny", "router0")
    assert tracing is not None
    assert tracing._provider.resource.attributes["service.name"] == "chat"
    tracing.close()


def test_no_spans_are_made_unless_the_environment_names_a_place(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", raising=False)
    monkeypatch.setitem(sys.modules, "router.tracing", None)
    with caplog.at_level(logging.WARNING):
        assert tracing_of("tiny", "router0") is None
        assert not caplog.messages
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:1/v1/traces")
        assert tracing_of("tiny", "router0") is None
    assert caplog.messages == ["No spans are exported, though OTEL_* ask for them: install pdserve[otel]."]
