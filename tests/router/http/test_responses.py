"""/v1/responses: the stateless text subset, whole and as events, by hand and through the client library."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from pdserve.request import FinishReason
from router.generation import Tokens
from router.http.service import ServedModel

BODY = {"model": "tiny", "input": "hey"}


async def test_whole(client: httpx.AsyncClient, dispatcher: Any, model: ServedModel) -> None:
    body = BODY | {"instructions": "be brief", "max_output_tokens": 20, "temperature": 0}
    answer = (await client.post("/v1/responses", json=body)).json()
    assert (answer["object"], answer["status"], answer["error"]) == ("response", "completed", None)
    [item] = answer["output"]
    assert (item["type"], item["role"], item["content"][0]["text"]) == ("message", "assistant", "Hi 🙂!")
    assert answer["usage"]["output_tokens"] == 9
    assert answer["usage"]["input_tokens_details"] == {"cached_tokens": 3}
    request = dispatcher.started[0].request
    assert request.sampling.max_tokens == 20
    prompt = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhey<|im_end|>\n<|im_start|>assistant\n"
    assert request.prompt_token_ids == tuple(model.tokenizer.encode(prompt, add_special=False))


async def test_response_repeats_what_was_asked(client: httpx.AsyncClient) -> None:
    asked = {
        "instructions": "be brief",
        "metadata": {"a": "b"},
        "text": {"format": {"type": "json_object"}},
        "parallel_tool_calls": False,
        "tool_choice": "none",
        "tools": [{"type": "function", "name": "f", "description": None, "parameters": None, "strict": True}],
        "user": "me",
    }
    answer = (await client.post("/v1/responses", json=BODY | asked)).json()
    assert {name: answer[name] for name in asked} == asked
    plain = (await client.post("/v1/responses", json=BODY)).json()
    assert (plain["tools"], plain["tool_choice"], plain["metadata"]) == ([], "auto", {})
    assert plain["text"] == {"format": {"type": "text"}}


async def test_result_of_a_call_in_parts(client: httpx.AsyncClient, dispatcher: Any, model: ServedModel) -> None:
    parts = [{"type": "input_text", "text": "one"}, {"type": "input_text", "text": "two"}]
    items = [
        {"role": "user", "content": "hey"},
        {"type": "function_call_output", "call_id": "c", "output": parts},
    ]
    assert (await client.post("/v1/responses", json=BODY | {"input": items})).status_code == 200
    assert "one\ntwo" in model.tokenizer.decode(dispatcher.started[0].request.prompt_token_ids)


async def test_events(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/responses", json=BODY | {"stream": True})
    blocks = [block.splitlines() for block in response.text.strip().split("\n\n")]
    events = [json.loads(data[6:]) for _, data in blocks]
    assert [name[7:] for name, _ in blocks] == [event["type"] for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    text = "".join(event["delta"] for event in events if event["type"].endswith("text.delta"))
    assert text == events[-1]["response"]["output"][0]["content"][0]["text"] == "Hi 🙂!"
    assert events[-1]["response"]["usage"]["output_tokens"] == 9


async def test_cut_answer_is_incomplete(client: httpx.AsyncClient, dispatcher: Any) -> None:
    dispatcher.script = [Tokens((39,), FinishReason.LENGTH)]
    answer = (await client.post("/v1/responses", json=BODY)).json()
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    stream = await client.post("/v1/responses", json=BODY | {"stream": True})
    assert "event: response.incomplete" in stream.text


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"input": []}, "input"),
        ({"input": [{"content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"frobnicate": 1}, "frobnicate"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"input": [{"role": "user", "content": 3}]}, "input[0].content"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": 3}]}, "input[0].output"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
    ],
)
async def test_what_is_not_there_is_named(client: httpx.AsyncClient, change: dict[str, Any], param: str) -> None:
    response = await client.post("/v1/responses", json=BODY | change)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith(param)


async def test_format(client: httpx.AsyncClient, dispatcher: Any) -> None:
    form = {"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": True}
    await client.post("/v1/responses", json=BODY | {"text": {"format": form}})
    assert dispatcher.started[0].request.sampling.grammar.source == '{"type":"object"}'
