"""A model that was taught to call tools, as far as its template says: calls that are forced or strict are valid."""

from __future__ import annotations

import json
import re
from functools import partial
from typing import Any

import openai
import pytest

from tests.e2e.test_conformance import ask, assert_same, post
from tests.support.at_once import at_once
from tests.support.stack import Stack
from tests.support.tool_model import ASK, CITY, CLOCK, SHOWN, STRICT, TOOLS, assert_holds

pytestmark = pytest.mark.e2e

ANSWER = {"type": "object", "properties": {"answer": {"type": "string", "maxLength": 10}}, "required": ["answer"]}
JSON = {"type": "json_schema", "json_schema": {"name": "x", "schema": {**ANSWER, "additionalProperties": False}}}
BODIES: dict[str, dict[str, Any]] = {
    "loose": {"messages": SHOWN, "tools": [CITY, CLOCK]},
    "strict": {"messages": SHOWN, "tools": [STRICT, CLOCK], "logprobs": True, "top_logprobs": 2},
    "strict, drawn": {"messages": SHOWN, "tools": [STRICT], "temperature": 1, "seed": 5, "n": 2},
    "strict, one call": {"messages": SHOWN, "tools": [STRICT, CLOCK], "parallel_tool_calls": False},
    "strict, text": {"messages": [{"role": "user", "content": "Say hi."}], "tools": [STRICT, CLOCK]},
    "required": {"messages": ASK, "tools": [CITY, CLOCK], "tool_choice": "required"},
    "format and a call": {"messages": SHOWN, "tools": [STRICT, CLOCK], "response_format": JSON},
    "format": {"messages": [{"role": "user", "content": "Say hi."}], "tools": [STRICT], "response_format": JSON},
}
DEFAULTS = {"temperature": 0, "max_tokens": 60}


@pytest.fixture
def client(with_tools: Stack) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{with_tools.url}/v1", api_key="x", max_retries=0)


def without_ids(choices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for choice in choices:
        for call in choice["message"].get("tool_calls", []):
            assert call.pop("id").startswith("call_")
    return choices


def streamed_choices(stack: Stack, body: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Content, calls and reason of each choice of a stream."""
    found: dict[int, dict[str, Any]] = {}
    text = post(stack, "/v1/chat/completions", body | {"stream": True})
    for line in re.findall(r"^data: (\{.*)$", text, re.MULTILINE):
        for choice in json.loads(line)["choices"]:
            mine = found.setdefault(choice["index"], {"content": "", "calls": [], "finish_reason": None})
            mine["content"] += choice["delta"].get("content") or ""
            mine["calls"] += [call["function"] for call in choice["delta"].get("tool_calls", [])]
            mine["finish_reason"] = choice["finish_reason"] or mine["finish_reason"]
    return found


@pytest.mark.parametrize("name", BODIES)
def test_same_calls_in_every_mode(with_tools: Stack, mixed_with_tools: Stack, name: str) -> None:
    body = DEFAULTS | BODIES[name]
    stacks = (mixed_with_tools, with_tools)
    answers = at_once(*(partial(ask, each, "/v1/chat/completions", body) for each in stacks))
    streams = at_once(*(partial(streamed_choices, each, body) for each in stacks))
    whole = [without_ids(answer["choices"]) for answer in answers]
    assert_same(whole[1], whole[0])
    for stream in streams:
        for choice, streamed in zip(whole[0], stream.values(), strict=True):
            message = choice["message"]
            assert streamed["content"] == (message["content"] or "")
            assert streamed["calls"] == [call["function"] for call in message.get("tool_calls", [])]
            assert streamed["finish_reason"] == choice["finish_reason"]


def test_strict_arguments_hold_to_the_schema_and_others_need_not(with_tools: Stack) -> None:
    def called(**body: Any) -> list[str]:
        choices = ask(with_tools, "/v1/chat/completions", DEFAULTS | body)["choices"]
        assert [choice["finish_reason"] for choice in choices] == ["tool_calls"] * len(choices)
        return [call["function"]["arguments"] for choice in choices for call in choice["message"]["tool_calls"]]

    [loose] = called(**BODIES["loose"])
    assert "kelvin" in loose
    for name in ("strict", "strict, drawn", "strict, one call", "format and a call"):
        for arguments in called(**BODIES[name]):
            assert_holds(arguments)


def test_migrated_call_still_holds(with_tools: Stack, mixed_with_tools: Stack) -> None:
    """The grammar's state comes back from the tokens; the worker dies while the arguments are written."""
    body = DEFAULTS | BODIES["strict"] | {"return_token_ids": True}
    expected = ask(mixed_with_tools, "/v1/chat/completions", body)["choices"][0]
    connection = with_tools.client.send(body | {"stream": True})
    request_id, token_ids, calls = "", [], []
    with connection, connection.getresponse() as response:
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            for choice in event["choices"]:
                token_ids += choice.get("token_ids") or []
                calls += choice["delta"].get("tool_calls") or []
            if len(token_ids) >= 18 and not request_id:
                request_id = event["id"]
                with_tools.holder(request_id, "decode").kill()
    assert request_id
    assert token_ids == expected["token_ids"]
    [call] = calls
    assert_holds(call["function"]["arguments"])
    with_tools.revive()
    with_tools.assert_pools_whole()


def test_forced_call(client: openai.OpenAI) -> None:
    for choice, names in (
        ("required", {"get_weather", "get_time"}),
        ({"type": "function", "function": {"name": "get_weather"}}, {"get_weather"}),
    ):
        for seed in range(3):
            answer = client.chat.completions.create(
                model="with-tools",
                messages=[{"role": "user", "content": "What is the weather in Paris?"}],
                tools=TOOLS,  # type: ignore[arg-type]
                tool_choice=choice,  # type: ignore[arg-type]
                seed=seed,
                max_tokens=80,
            ).choices[0]
            assert answer.finish_reason == "tool_calls"
            assert answer.message.content is None
            assert answer.message.tool_calls is not None
            [call] = answer.message.tool_calls
            assert call.type == "function"
            assert call.function.name in names
            arguments = json.loads(call.function.arguments)
            if call.function.name == "get_weather":
                assert set(arguments) == {"city", "unit"}
                assert arguments["unit"] in ("celsius", "fahrenheit")


def test_streamed_call(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="with-tools",
        messages=[{"role": "user", "content": "What is the weather in Paris?"}],
        tools=TOOLS,  # type: ignore[arg-type]
        tool_choice="required",
        temperature=0,
        max_tokens=80,
        stream=True,
    )
    chunks = [chunk.choices[0] for chunk in stream if chunk.choices]
    calls = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    assert len(calls) == 1
    assert calls[0].function is not None
    json.loads(calls[0].function.arguments or "")
    assert chunks[-1].finish_reason == "tool_calls"


def test_responses_client(client: openai.OpenAI) -> None:
    answer = client.responses.create(
        model="with-tools", input="Say hello.", temperature=0, max_output_tokens=8, store=False
    )
    assert answer.output_text
    assert answer.usage is not None
    assert answer.usage.output_tokens <= 8
    with client.responses.stream(
        model="with-tools", input="Say hello.", temperature=0, max_output_tokens=8, store=False
    ) as stream:
        events = list(stream)
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert events[-1].type == "response.incomplete"  # eight tokens are too few
    assert text == answer.output_text == events[-1].response.output_text
