"""Responses are OpenAI's, byte for byte: whole bodies, event streams, usage and finish reasons."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest

from pdserve.request import FinishReason
from router.generation import Tokens
from router.http.service import ServedModel

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hey"}]}
COMPLETION = {"model": "tiny", "prompt": "hey"}
CHAT_HEAD = (
    '"id":"chatcmpl-ID","object":"chat.completion.chunk","created":1700000001,"model":"tiny","system_fingerprint":null'
)
TEXT_HEAD = '"id":"cmpl-ID","object":"text_completion","created":1700000001,"model":"tiny","system_fingerprint":null'
CHAT_PROMPT_TOKENS = len("_user\nhey_\n_assistant\n")


def without_id(text: str) -> str:
    return re.sub(r"(?<=cmpl-)[0-9a-f]{32}", "ID", text)


def chat_chunk(delta: str, finish: str = "null", usage: str = "") -> str:
    choices = f'[{{"index":0,"delta":{delta},"logprobs":null,"finish_reason":{finish}}}]'
    return f'data: {{{CHAT_HEAD},"choices":{choices}{usage}}}\n\n'


def text_chunk(text: str, finish: str = "null", usage: str = "") -> str:
    choices = f'[{{"text":"{text}","index":0,"logprobs":null,"finish_reason":{finish}}}]'
    return f'data: {{{TEXT_HEAD},"choices":{choices}{usage}}}\n\n'


async def test_chat_body(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert without_id(response.text) == (
        '{"id":"chatcmpl-ID","object":"chat.completion","created":1700000001,"model":"tiny","system_fingerprint":null,'
        '"choices":[{"index":0,"message":{"role":"assistant","content":"Hi 🙂!","refusal":null},"logprobs":null,'
        f'"finish_reason":"stop"}}],"usage":{{"prompt_tokens":{CHAT_PROMPT_TOKENS},"completion_tokens":9,'
        f'"total_tokens":{CHAT_PROMPT_TOKENS + 9},"prompt_tokens_details":{{"cached_tokens":3}}}}}}'
    )


async def test_completion_body(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/completions", json=COMPLETION)
    assert without_id(response.text) == (
        f'{{{TEXT_HEAD},"choices":[{{"text":"Hi 🙂!","index":0,"logprobs":null,"finish_reason":"stop"}}],'
        '"usage":{"prompt_tokens":3,"completion_tokens":9,"total_tokens":12,'
        '"prompt_tokens_details":{"cached_tokens":3}}}'
    )


async def test_chat_stream(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/chat/completions", json=CHAT | {"stream": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert without_id(response.text) == (
        chat_chunk('{"role":"assistant","content":"","refusal":null}')
        + "".join(chat_chunk(f'{{"content":"{char}"}}') for char in "Hi 🙂!")
        + chat_chunk("{}", '"stop"')
        + "data: [DONE]\n\n"
    )


async def test_completion_stream(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/completions", json=COMPLETION | {"stream": True})
    assert without_id(response.text) == (
        "".join(text_chunk(char) for char in "Hi 🙂!") + text_chunk("", '"stop"') + "data: [DONE]\n\n"
    )


async def test_stream_with_usage(client: httpx.AsyncClient, dispatcher: Any) -> None:
    dispatcher.script = [Tokens((39,)), Tokens((), FinishReason.LENGTH)]
    body = {"stream": True, "stream_options": {"include_usage": True}}
    chat = await client.post("/v1/chat/completions", json=CHAT | body)
    null, total = ',"usage":null', CHAT_PROMPT_TOKENS + 1
    assert without_id(chat.text) == (
        chat_chunk('{"role":"assistant","content":"","refusal":null}', usage=null)
        + chat_chunk('{"content":"H"}', usage=null)
        + chat_chunk("{}", '"length"', usage=null)
        + f'data: {{{CHAT_HEAD},"choices":[],"usage":{{"prompt_tokens":{CHAT_PROMPT_TOKENS},"completion_tokens":1,'
        f'"total_tokens":{total},"prompt_tokens_details":{{"cached_tokens":3}}}}}}\n\ndata: [DONE]\n\n'
    )
    text = await client.post("/v1/completions", json=COMPLETION | body)
    assert without_id(text.text) == (
        text_chunk("H", usage=null)
        + text_chunk("", '"length"', usage=null)
        + f'data: {{{TEXT_HEAD},"choices":[],"usage":{{"prompt_tokens":3,"completion_tokens":1,'
        '"total_tokens":4,"prompt_tokens_details":{"cached_tokens":3}}}\n\ndata: [DONE]\n\n'
    )


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_stream_with_continuous_usage(client: httpx.AsyncClient, dispatcher: Any, path: str) -> None:
    """As vLLM writes it and guidellm asks for: with every chunk the tokens so far."""
    dispatcher.script = [Tokens((39,)), Tokens((72,)), Tokens((), FinishReason.LENGTH)]
    body = CHAT if "chat" in path else COMPLETION
    options = {"include_usage": True, "continuous_usage_stats": True}
    response = await client.post(path, json=body | {"stream": True, "stream_options": options})
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
    counts = [json.loads(event)["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert {1, 2} <= set(counts)
    assert counts[-1] == 2
    alone = {"continuous_usage_stats": True}  # without include_usage there is none, as with vLLM
    response = await client.post(path, json=body | {"stream": True, "stream_options": alone})
    assert "usage" not in response.text


async def test_tokens_that_arrive_together_leave_together(client: httpx.AsyncClient, dispatcher: Any) -> None:
    dispatcher.script = [Tokens((39, 72, 0)), Tokens((0, 257), FinishReason.STOP)]
    response = await client.post("/v1/completions", json=COMPLETION | {"stream": True})
    assert without_id(response.text) == (
        text_chunk("Hi!") + text_chunk("!") + text_chunk("", '"stop"') + "data: [DONE]\n\n"
    )


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_answer_without_text(client: httpx.AsyncClient, dispatcher: Any, path: str) -> None:
    dispatcher.script = [Tokens((257,), FinishReason.STOP)]
    body = COMPLETION if path == "/v1/completions" else CHAT
    whole = (await client.post(path, json=body)).json()
    assert whole["usage"]["completion_tokens"] == 1
    assert whole["choices"][0]["finish_reason"] == "stop"
    stream = await client.post(path, json=body | {"stream": True})
    assert stream.text.endswith('"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n')


async def test_models(client: httpx.AsyncClient) -> None:
    [card] = (await client.get("/v1/models")).json()["data"]
    assert {key: card[key] for key in ("id", "object", "created", "owned_by")} == {
        "id": "tiny",
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "pdserve",
    }
    assert card["max_model_len"] == card["limits"]["context_tokens"] == 100
    assert (card["capabilities"]["chat"], card["capabilities"]["tools"]) == (True, False)
    assert (await client.get("/v1/models/tiny")).json() == card
    missing = await client.get("/v1/models/org/other")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


async def test_timeline_for_who_asks(client: httpx.AsyncClient, model: ServedModel) -> None:
    headers = {"x-pdserve-timeline": "1", "x-request-id": "mine"}
    whole = (await client.post("/v1/chat/completions", json=CHAT, headers=headers)).json()
    timeline = whole["x_pdserve"]
    assert timeline["request_id"] == "mine"
    assert sum(timeline["stages"].values()) == pytest.approx(timeline["ttft_s"])
    assert set(timeline["handoff"]) == {"reserve", "transfer", "commit", "resume"}
    assert timeline["tpot_s"] >= 0


@pytest.mark.parametrize("options", [None, {"include_usage": False}, {"include_usage": True}])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_a_stream_tells_the_timeline_in_a_chunk_without_a_choice(
    client: httpx.AsyncClient, path: str, options: dict[str, bool] | None
) -> None:
    body = (CHAT if "chat" in path else COMPLETION) | {"stream": True, "stream_options": options}
    with_usage = bool(options and options["include_usage"])
    for asked in ("1", "0"):
        stream = await client.post(path, json=body, headers={"x-pdserve-timeline": asked})
        chunks = [json.loads(line[6:]) for line in stream.text.splitlines() if line.startswith("data: {")]
        told = [chunk for chunk in chunks if "x_pdserve" in chunk]
        assert told == ([chunks[-1]] if asked == "1" else [])
        assert (chunks[-1]["choices"] == []) == (with_usage or asked == "1")
        assert bool(chunks[-1].get("usage")) == with_usage
