"""A chat streams, remembers its turns, and survives a stopped or failed answer."""

from __future__ import annotations

import io
import json
import signal
import threading
from typing import Any, Protocol

import pytest
from rich.console import Console

from pdserve.cli.chat import Chat
from pdserve.cli.chat_stream import AnswerStats, ChatFailed, stream_answer

DONE = b"data: [DONE]\n\n"


class Server(Protocol):
    url: str
    stream: list[bytes | None]
    status: int
    bodies: list[Any]
    client_gone: threading.Event


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text(content: str) -> bytes:
    return event(choices=[{"index": 0, "delta": {"content": content}}])


USAGE = event(
    choices=[],
    usage={"prompt_tokens": 10, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 8}},
)


def chat(server: Server) -> tuple[Chat, io.StringIO]:
    out = io.StringIO()
    return Chat(server.url, "tiny", "Be brief.", 32, 0.5, Console(file=out, width=200)), out


def test_two_turns(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    one, out = chat(server)
    server.stream = [b": a comment\n\n", text("Par"), text("is"), USAGE, DONE]
    one.turn("Capital of France?")
    assert "Paris" in capsys.readouterr().out
    assert "3 tokens" in out.getvalue()
    assert "8 of 10 prompt tokens cached" in out.getvalue()
    one.turn("Of Spain?")
    first, second = server.bodies
    assert first["stream"] is True
    assert first["max_tokens"] == 32
    assert first["temperature"] == 0.5
    assert [message["content"] for message in second["messages"]] == [
        "Be brief.",
        "Capital of France?",
        "Paris",
        "Of Spain?",
    ]


def test_commands(server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    one, out = chat(server)
    server.stream = [text("yes"), DONE]
    lines = iter(["", "hello", "/what", "/reset", "again", "/quit", "never read"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    one.run()
    assert [len(body["messages"]) for body in server.bodies] == [2, 2]
    assert next(lines) == "never read"
    assert out.getvalue().count("/reset") == 2
    capsys.readouterr()


def test_the_end_of_input_ends_the_chat(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def end(prompt: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    chat(server)[0].run()


def test_ctrl_c_stops_the_answer_only(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    one, out = chat(server)
    server.stream = [text("half an"), None, text(" answer"), DONE]

    class Interrupting(io.StringIO):
        def write(self, piece: str) -> int:
            signal.raise_signal(signal.SIGINT)
            return super().write(piece)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", Interrupting())
        one.turn("Question?")
    assert "stopped" in out.getvalue()
    assert server.client_gone.wait(10)  # which aborts the request on the workers
    assert [message["role"] for message in one.messages] == ["system", "user", "assistant"]
    server.stream = [text("fine"), DONE]
    one.turn("Next?")
    assert "fine" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("status", "stream", "message"),
    [
        (400, [b'{"error": {"message": "max_tokens is too large"}}'], r"max_tokens is too large \(status 400\)"),
        (502, [b"<html>"], "status 502"),
        (200, [text("a"), event(error={"message": "A worker failed."})], "A worker failed"),
        (200, [text("a")], "broke off"),
        (200, [b"data: {\n\n"], "no JSON"),
    ],
)
def test_failures_are_sentences(server: Server, status: int, stream: list[bytes | None], message: str) -> None:
    server.status, server.stream = status, stream
    with pytest.raises(ChatFailed, match=message):
        list(stream_answer(server.url, {}, AnswerStats(started_s=0.0)))


def test_a_failed_answer_keeps_the_conversation(server: Server) -> None:
    one, out = chat(server)
    server.status = 503
    one.turn("Question?")
    assert "status 503" in out.getvalue()
    assert [message["role"] for message in one.messages] == ["system"]


def test_speed_counts_the_tokens_after_the_first() -> None:
    stats = AnswerStats(started_s=1.0, first_s=1.5, last_s=3.5, output_tokens=21, prompt_tokens=5)
    assert stats.describe() == ("first token after 0.50 s · 21 tokens · 10.0 tokens/s · 0 of 5 prompt tokens cached")
    assert AnswerStats(started_s=1.0).describe() == "no token"
