"""Bad input gets a 4xx in OpenAI's error shape that names the field, and never reaches the dispatcher."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.types import Message

from router.http.app import make_app
from router.http.service import Service

USER = [{"role": "user", "content": "hey"}]
TEXT_PATH, CHAT_PATH = "/v1/completions", "/v1/chat/completions"
UNSUPPORTED = "unsupported_parameter"
DEEP: dict[str, Any] = {}
for _ in range(17):
    DEEP = {"items": DEEP}
TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}

# (what is wrong in a completion, param, code, words of the message)
COMPLETIONS: list[tuple[dict[str, Any], str | None, str | None, str]] = [
    ({"model": None}, "model", None, "valid string"),
    ({"model": 3}, "model", None, "valid string"),
    ({"prompt": ""}, "prompt", None, "must not be empty"),
    ({"prompt": []}, "prompt", None, "must not be empty"),
    ({"prompt": [""]}, "prompt", None, "must not be empty"),
    ({"prompt": None}, "prompt", None, "must be a string or an array of token ids"),
    ({"prompt": 7}, "prompt", None, "must be a string or an array of token ids"),
    ({"prompt": {}}, "prompt", None, "must be a string or an array of token ids"),
    ({"prompt": [1, "a"]}, "prompt", None, "must be a string or an array of token ids"),
    ({"prompt": [1, True]}, "prompt", None, "must be a string or an array of token ids"),
    ({"prompt": [1.5]}, "prompt", None, "must be a string or an array of token ids"),
    ({"prompt": ["a", ""]}, "prompt", None, "must not be empty"),
    ({"prompt": ["a", 3]}, "prompt", None, "must be a string or an array of token ids"),
    ({"prompt": ["a"] * 65}, "prompt", None, "at most 64 prompts"),
    ({"prompt": ["a"] * 16, "n": 8}, "prompt", None, "may have 64 choices"),
    ({"prompt": ["a", [258]]}, "prompt", None, "from 0 to 257"),
    ({"prompt": [258]}, "prompt", None, "from 0 to 257"),
    ({"prompt": [-1]}, "prompt", None, "from 0 to 257"),
    ({"prompt": [10**30]}, "prompt", None, "from 0 to 257"),
    ({"prompt": "x" * 100}, "prompt", "context_length_exceeded", "maximum context length is 100 tokens"),
    ({"prompt": [1] * 99, "max_tokens": 2}, "prompt", "context_length_exceeded", "101 tokens (99 in the prompt, 2 in"),
    ({"max_tokens": 0}, "max_tokens", None, "may be 0 only with 'echo'"),
    ({"max_tokens": -5}, "max_tokens", None, "greater than or equal to 0"),
    ({"max_tokens": 10**25}, "max_tokens", None, "less than or equal to"),
    ({"max_tokens": "7"}, "max_tokens", None, "valid integer"),
    ({"max_tokens": 7.0}, "max_tokens", None, "valid integer"),
    ({"max_tokens": True}, "max_tokens", None, "valid integer"),
    ({"min_tokens": 17}, "min_tokens", None, "at most 'max_tokens' (16)"),
    ({"temperature": -0.1}, "temperature", None, "greater than or equal to 0"),
    ({"temperature": 2.5}, "temperature", None, "less than or equal to 2"),
    ({"temperature": "hot"}, "temperature", None, "valid number"),
    ({"temperature": 10**400}, "temperature", None, "valid number"),
    ({"top_p": 1.01}, "top_p", None, "less than or equal to 1"),
    ({"top_k": -2}, "top_k", None, "greater than or equal to -1"),
    ({"top_k": 2**31}, "top_k", None, "less than or equal to"),
    ({"seed": 1.5}, "seed", None, "valid integer"),
    ({"seed": 2**63}, "seed", None, "less than or equal to"),
    ({"stop": ""}, "stop", None, "1 to 256 bytes"),
    ({"stop": ["é" * 129]}, "stop", None, "1 to 256 bytes"),
    ({"stop": ["a"] * 17}, "stop", None, "at most 16"),
    ({"stop": [1]}, "stop", None, "must be a string"),
    ({"stop_token_ids": [258]}, "stop_token_ids", None, "from 0 to 257"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids[0]", None, "valid integer"),
    ({"stop_token_ids": [1] * 65}, "stop_token_ids", None, "at most 64"),
    ({"ignore_eos": 1}, "ignore_eos", None, "valid boolean"),
    ({"stream": "yes"}, "stream", None, "valid boolean"),
    ({"stream_options": {"include_usage": True}}, "stream_options", None, "only allowed when 'stream' is true"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", None, "valid boolean"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown_parameter", "Unrecognized"),
    ({"stream": True, "stream_options": []}, "stream_options", None, "must be an object"),
    ({"user": 3}, "user", None, "valid string"),
    ({"metadata": {"a": 1}}, "metadata", None, "must be strings"),
    ({"metadata": {str(i): "" for i in range(17)}}, "metadata", None, "at most 16 pairs"),
    ({"metadata": {"a": "x" * 513}}, "metadata", None, "at most 512 characters"),
    ({"metadata": {"k" * 65: ""}}, "metadata", None, "at most 64 characters"),
    ({"frobnicate": 1}, "frobnicate", "unknown_parameter", "Unrecognized request argument supplied: frobnicate"),
    ({"messages": USER}, "messages", "unknown_parameter", "Unrecognized"),
    ({"n": 0}, "n", None, "greater than or equal to 1"),
    ({"n": 9}, "n", None, "less than or equal to 8"),
    ({"n": True}, "n", None, "valid integer"),
    ({"n": 10**9}, "n", None, "less than or equal to 8"),
    ({"best_of": 9}, "best_of", None, "less than or equal to 8"),
    ({"best_of": 1, "n": 2}, "best_of", None, "at least 'n'"),
    ({"best_of": 3, "stream": True}, "best_of", None, "cannot be streamed"),
    ({"logprobs": 21}, "logprobs", None, "less than or equal to 20"),
    ({"logprobs": -1}, "logprobs", None, "greater than or equal to 0"),
    ({"logprobs": True}, "logprobs", None, "valid integer"),
    ({"prompt_logprobs": 21}, "prompt_logprobs", None, "less than or equal to 20"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", None, "cannot be streamed"),
    ({"prompt_logprobs": 1, "echo": True}, "prompt_logprobs", None, "tells of the prompt too"),
    ({"suffix": "end"}, "suffix", UNSUPPORTED, "not supported"),
    ({"priority": 101}, "priority", None, "less than or equal to 100"),
    ({"priority": -101}, "priority", None, "greater than or equal to -100"),
    ({"min_p": 1.1}, "min_p", None, "less than or equal to 1"),
    ({"presence_penalty": 2.1}, "presence_penalty", None, "less than or equal to 2"),
    ({"frequency_penalty": -2.1}, "frequency_penalty", None, "greater than or equal to -2"),
    ({"repetition_penalty": 0}, "repetition_penalty", None, "greater than 0"),
    ({"repetition_penalty": 11}, "repetition_penalty", None, "less than or equal to 10"),
    ({"logit_bias": []}, "logit_bias", None, "must be an object"),
    ({"logit_bias": {"a": 1}}, "logit_bias", None, "keys must be token ids"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", None, "keys must be token ids"),
    ({"logit_bias": {"258": 1}}, "logit_bias", None, "from 0 to 257"),
    ({"logit_bias": {"5": 101}}, "logit_bias", None, "from -100 to 100"),
    ({"logit_bias": {"5": "x"}}, "logit_bias", None, "from -100 to 100"),
    ({"logit_bias": {str(i): 0 for i in range(1025)}}, "logit_bias", None, "at most 1024"),
    ({"guided_regex": ""}, "guided_regex", None, "not empty"),
    ({"guided_regex": "a" * (2**16 + 1)}, "guided_regex", None, "at most 65536 bytes"),
    ({"guided_regex": "fault"}, "guided_regex", None, "cannot be used"),
    ({"guided_choice": []}, "guided_choice", None, "1 to 256"),
    ({"guided_choice": ["a"] * 257}, "guided_choice", None, "1 to 256"),
    ({"guided_choice": [""]}, "guided_choice", None, "not empty"),
    ({"guided_json": "x"}, "guided_json", None, "an object"),
    ({"guided_json": {"type": "object"}, "guided_regex": "a"}, "guided_regex", None, "not several"),
    ({"structured_outputs": {"json": DEEP}}, "structured_outputs.json", None, "deeper than 16 levels"),
    ({"structured_outputs": {"yaml": ""}}, "structured_outputs.yaml", "unknown_parameter", "Unrecognized"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", None, "is required"),
    ({"response_format": {"type": "xml"}}, "response_format.type", None, "'json_object'"),
]
CHATS: list[tuple[dict[str, Any], str | None, str | None, str]] = [
    ({"messages": []}, "messages", None, "at least 1 item"),
    ({"messages": None}, "messages", None, "valid list"),
    ({"messages": "hey"}, "messages", None, "valid list"),
    ({"messages": USER * 1025}, "messages", None, "at most 1024 items"),
    ({"messages": ["hey"]}, "messages[0]", None, "must be an object"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter", "is required"),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter", "is required"),
    ({"messages": [*USER, {"role": "king", "content": "x"}]}, "messages[1].role", None, "'user'"),
    ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role", None, "use 'tool'"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", None, "of the role 'tool'"),
    ({"messages": [{**USER[0], "tool_call_id": "1"}]}, "messages[0].tool_call_id", None, "and no others"),
    ({"messages": [{**USER[0], "tool_calls": [CALL]}]}, "messages[0].tool_calls", None, "'assistant'"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": "["}}]}]},
        "messages[0].tool_calls",
        None,
        "no JSON object",
    ),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", None, "must be a string"),
    ({"messages": [{"role": "user", "content": [3]}]}, "messages[0].content", None, "must be an object"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
        "messages[0].content",
        None,
        "parts other than 'text' are not supported",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]},
        "messages[0].content",
        None,
        "string 'text'",
    ),
    (
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
        "messages[0].tool_calls[0].id",
        "missing_required_parameter",
        "is required",
    ),
    ({"messages": [{"role": "user", "content": "x", "y": 1}]}, "messages[0].y", "unknown_parameter", "Unrecognized"),
    ({"messages": [{"role": "user", "content": "x" * 99}]}, "messages", "context_length_exceeded", "in the messages"),
    ({"max_tokens": 3, "max_completion_tokens": 3}, "max_tokens", None, "Only one of"),
    ({"max_completion_tokens": 1000}, "messages", "context_length_exceeded", "1000 in the completion"),
    ({"prompt": "x"}, "prompt", "unknown_parameter", "Unrecognized"),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "missing_required_parameter", "is required"),
    ({"tools": [TOOL]}, "tools", UNSUPPORTED, "was not taught to call tools"),
    ({"tools": [TOOL] * 129}, "tools", None, "at most 128"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", None, "pattern"),
    ({"tool_choice": "required"}, "tool_choice", None, "only allowed when 'tools'"),
    ({"top_logprobs": 2}, "top_logprobs", None, "only allowed when 'logprobs'"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", None, "less than or equal to 20"),
    ({"logprobs": 1}, "logprobs", None, "valid boolean"),
    ({"reasoning_effort": "low"}, "reasoning_effort", UNSUPPORTED, "does not know it"),
    ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs", None, "has no variable 'x'"),
    ({"continue_final_message": True}, "continue_final_message", None, "last message of the assistant"),
    (
        {"continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
        None,
        "exclude each other",
    ),
    ({"n": 9}, "n", None, "less than or equal to 8"),
    ({"chat_template": "{{ x }}"}, "chat_template", "unknown_parameter", "Unrecognized"),
]
CASES = [(TEXT_PATH, {"model": "tiny", "prompt": "hey"} | case[0], *case[1:]) for case in COMPLETIONS]
CASES += [(CHAT_PATH, {"model": "tiny", "messages": USER} | case[0], *case[1:]) for case in CHATS]


def check(response: httpx.Response, status: int, param: str | None, code: str | None, words: str) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert error["type"] == "invalid_request_error"
    assert (error["param"], error["code"]) == (param, code)
    assert words in error["message"]
    assert response.headers["x-request-id"]


@pytest.mark.parametrize(("path", "body", "param", "code", "words"), CASES)
async def test_field(
    client: httpx.AsyncClient,
    dispatcher: Any,
    path: str,
    body: dict[str, Any],
    param: str | None,
    code: str | None,
    words: str,
) -> None:
    check(await client.post(path, json=body), 400, param, code, words)
    assert dispatcher.started == []


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"model":"tiny"} x', "not valid JSON"),
        (b"prompt=hey", "not valid JSON"),
        (b'{"model":"tiny","prompt":"\xff"}', "not valid UTF-8"),
        (b'\xff\xfe{"model":"tiny"}', "not valid JSON"),
        (b'{"model":"tiny","prompt":"\\ud800"}', "not valid JSON"),
        (b'{"model":"tiny","prompt":"a","temperature":NaN}', "not valid JSON"),
        (b'{"model":"tiny","prompt":"a","temperature":Infinity}', "not valid JSON"),
        (b'{"model":"tiny","prompt":"a","temperature":1e999}', "not valid JSON"),
        (b'{"model":"tiny","prompt":"a","seed":' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b'"prompt"', "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"x":' + b"[" * 32 + b"]" * 32 + b"}", "deeper than 32"),
        (b'{"x":' + b"[" * 1_000_000, "deeper than 32"),
        (b'{"x":' * 100_000 + b"1" + b"}" * 100_000, "deeper than 32"),
    ],
)
async def test_body(client: httpx.AsyncClient, dispatcher: Any, body: bytes, words: str) -> None:
    for path in (TEXT_PATH, CHAT_PATH):
        check(await client.post(path, content=body), 400, None, None, words)
    assert dispatcher.started == []


async def test_depth_at_the_limit_is_judged_by_the_schema(client: httpx.AsyncClient) -> None:
    body = b'{"model":"tiny","prompt":"a","x":' + b"[" * 31 + b"]" * 31 + b"}"
    check(await client.post(TEXT_PATH, content=body), 400, "x", "unknown_parameter", "Unrecognized")


@pytest.mark.parametrize("name", ["model", "prompt"])
async def test_missing_field(client: httpx.AsyncClient, name: str) -> None:
    body = {"model": "tiny", "prompt": "hey"}
    del body[name]
    check(await client.post(TEXT_PATH, json=body), 400, name, "missing_required_parameter", "is required")


async def test_unknown_model(client: httpx.AsyncClient, dispatcher: Any) -> None:
    response = await client.post(CHAT_PATH, json={"model": "gpt-x", "messages": USER})
    check(response, 404, "model", "model_not_found", "'gpt-x' does not exist")
    assert dispatcher.started == []


async def test_unknown_path_and_method(client: httpx.AsyncClient) -> None:
    check(await client.post("/v1/embeddings", json={}), 404, None, "unknown_url", "POST /v1/embeddings")
    response = await client.get(TEXT_PATH)
    check(response, 405, None, "unknown_url", "GET /v1/completions; it takes POST")
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("value", ["yes", "2", "true", ""])
async def test_a_header_is_not_ignored_for_its_value(client: httpx.AsyncClient, dispatcher: Any, value: str) -> None:
    body = {"model": "tiny", "prompt": "hey"}
    response = await client.post(TEXT_PATH, json=body, headers={"x-pdserve-timeline": value})
    check(response, 400, None, None, "x-pdserve-timeline is 1")
    assert dispatcher.started == []


async def test_body_limit(client: httpx.AsyncClient, service: Service, dispatcher: Any) -> None:
    limit = service.limits.body_bytes
    head, tail = b'{"model":"tiny","prompt":"', b'"}'
    at_limit = head + b"x" * (limit - len(head) - len(tail)) + tail
    check(await client.post(TEXT_PATH, content=at_limit), 400, "prompt", "context_length_exceeded", "maximum context")
    declared = await client.post(TEXT_PATH, content=at_limit + b" ")
    check(declared, 413, None, "payload_too_large", str(limit))
    assert declared.headers["connection"] == "close"

    async def undeclared() -> AsyncIterator[bytes]:
        for _ in range(limit // 2**16 + 1):
            yield b" " * 2**16

    check(await client.post(TEXT_PATH, content=undeclared()), 413, None, "payload_too_large", str(limit))
    assert dispatcher.started == []


async def test_body_that_declares_too_much_is_not_read(service: Service) -> None:
    sent: list[Message] = []

    async def receive() -> Message:
        raise AssertionError("must not read")

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"content-length", str(service.limits.body_bytes + 1).encode())]
    await make_app(service)({"type": "http", "method": "POST", "path": TEXT_PATH, "headers": headers}, receive, send)
    assert sent[0]["status"] == 413


async def test_header_limits(client: httpx.AsyncClient) -> None:
    many = {f"x-{n}": "1" for n in range(101)}
    check(await client.get("/livez", headers=many), 431, None, "headers_too_large", "too large")
    check(await client.get("/livez", headers={"x": "y" * 2**14}), 431, None, "headers_too_large", "too large")
