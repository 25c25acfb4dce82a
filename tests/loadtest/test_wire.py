"""What bytes mean does not depend on how they are cut, and no answer of a server raises."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.target import Target, parse_target
from loadtest.wire import Exchange, request_bytes
from pdserve.slo import Slo

TARGET = Target("host", 80, "m", api_key="secret")


def sse(*events: object) -> bytes:
    lines = [event if isinstance(event, str) else json.dumps(event) for event in events]
    return "".join(f"data: {line}\n\n" for line in lines).encode()


def response(body: bytes, status: int = 200, chunked: bool = False) -> bytes:
    if chunked:
        cut = [body[start : start + 7] for start in range(0, len(body), 7)]
        body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in [*cut, b""])
        head = "Transfer-Encoding: chunked"
    else:
        head = f"Content-Length: {len(body)}"
    return f"HTTP/1.1 {status} X\r\n{head}\r\n\r\n".encode() + body


USAGE = {"prompt_tokens": 10, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 8}}
TOLD = {"ttft_s": 0.5, "tpot_s": 0.1, "stages": {"queue": 0.5}, "handoff": {}}
COMPLETION = (
    *({"choices": [{"text": text}]} for text in ("a", "b", "c")),
    {"choices": [{"text": "", "finish_reason": "length"}]},
    {"choices": [], "usage": USAGE, "x_pdserve": TOLD},
    "[DONE]",
)
CHAT = (
    {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
    {"choices": [{"delta": {"content": "é"}}]},
    {"choices": [{"delta": {}, "finish_reason": "stop"}]},
    "[DONE]",
)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=50), st.booleans())
def test_how_bytes_are_cut_changes_nothing_but_times(sizes: list[int], chunked: bool) -> None:
    data, exchange = response(sse(*COMPLETION), chunked=chunked), Exchange(0.0)
    while data and not exchange.finished:
        for size in sizes:
            piece, data = data[:size], data[size:]
            if piece:
                exchange.feed(piece, 1.0)
    outcome = exchange.outcome()
    assert outcome.ok
    assert (outcome.text, outcome.output_tokens, outcome.prompt_tokens, outcome.cached_tokens) == ("abc", 3, 10, 8)
    assert outcome.server is not None
    assert outcome.server.stages == {"queue": 0.5}


def test_times_are_those_of_chunks_with_text() -> None:
    data = [response(b"", chunked=False).replace(b"Content-Length: 0", b"Connection: close"), *map(sse, COMPLETION)]
    exchange = Exchange(10.0)
    for number, piece in enumerate(data):
        exchange.feed(piece, 11.0 + number)
    outcome = exchange.outcome(late_s=0.25)
    assert (outcome.ttft_s, outcome.tpot_s, outcome.gaps_s, outcome.e2e_s) == (2.0, 1.0, (1.0, 1.0), 4.0)
    assert outcome.late_s == 0.25


def test_chat_counts_no_chunk_without_text_and_no_usage_is_a_token_a_chunk() -> None:
    exchange = Exchange(0.0)
    exchange.feed(response(sse(*CHAT)), 1.0)
    outcome = exchange.outcome()
    assert (outcome.ok, outcome.text, outcome.output_tokens) == (True, "é", 1)
    assert outcome.tpot_s is None


@pytest.mark.parametrize(
    ("data", "status", "error"),
    [
        (b"", 0, "the connection ended"),
        (b"SSH-2.0\r\n\r\n", 0, "no HTTP"),
        (response(b'{"error": "busy"}', 503), 503, 'HTTP 503: {"error": "busy"}'),
        (response(sse(*COMPLETION[:2])), 200, "the response ended"),
        (response(sse(COMPLETION[0], {"error": {"message": "lost"}})), 200, "error in the stream"),
        (response(sse("{")), 200, "no chunk"),
        (response(sse("[1]")), 200, "no chunk"),
        (response(b"<html></html>"), 200, "the response ended"),
        (response(b"x" * (3 << 20)), 200, "too long"),
    ],
)
def test_failures_are_outcomes(data: bytes, status: int, error: str) -> None:
    exchange = Exchange(0.0)
    exchange.feed(data, 1.0)
    assert exchange.finished
    outcome = exchange.outcome()
    assert not outcome.ok
    assert outcome.status == status
    assert error in outcome.error


@given(st.binary(max_size=300), st.booleans())
def test_nothing_that_a_peer_sends_raises(data: bytes, after_head: bool) -> None:
    exchange = Exchange(0.0)
    if after_head:
        exchange.feed(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", 1.0)
    exchange.feed(data, 1.0)
    exchange.fail("over")
    exchange.outcome()


def test_the_request_asks_for_usage_and_timeline() -> None:
    head, _, body = request_bytes(TARGET, "/completions", {"prompt": (1, 2)}).partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/completions HTTP/1.1\r\n")
    assert b"x-pdserve-timeline: 1" in head
    assert b"Authorization: Bearer secret" in head
    assert b"x-pdserve-slo" not in head
    sent = json.loads(body)
    assert sent == {"model": "m", "prompt": [1, 2], "stream": True, "stream_options": {"include_usage": True}}
    assert f"Content-Length: {len(body)}".encode() in head


def test_the_server_is_told_by_what_it_is_judged() -> None:
    head = request_bytes(replace(TARGET, slo=Slo(0.5, 0.05)), "/completions", {}).partition(b"\r\n\r\n")[0]
    told = next(line for line in head.split(b"\r\n") if line.startswith(b"x-pdserve-slo: "))
    assert json.loads(told.partition(b": ")[2]) == {"ttft_ms": 500.0, "tpot_ms": 50.0}


@pytest.mark.parametrize(
    ("url", "host", "port", "tls", "prefix"),
    [
        ("http://a:8000", "a", 8000, False, "/v1"),
        ("https://api.example.com/openai/v1/", "api.example.com", 443, True, "/openai/v1"),
    ],
)
def test_urls(url: str, host: str, port: int, tls: bool, prefix: str) -> None:
    target = parse_target(url, "m", "key")
    assert (target.host, target.port, target.tls, target.prefix) == (host, port, tls, prefix)
    assert "key" not in repr(target)


@pytest.mark.parametrize("url", ["ftp://a", "localhost:8000", "http://"])
def test_no_url_is_a_value_error(url: str) -> None:
    with pytest.raises(ValueError, match="URL"):
        parse_target(url, "m")
