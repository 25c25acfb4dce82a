"""A model that was taught to call tools, as far as its template says: forced calls are calls, and valid."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.support.stack import Stack

pytestmark = pytest.mark.e2e

TEMPLATE = """{%- if tools %}<|im_start|>system
Call functions as <tool_call>{"name": ..., "arguments": ...}</tool_call>. Functions: {{ tools | tojson }}<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 20},
                    "unit": {"enum": ["celsius", "fahrenheit"]},
                },
                "required": ["city", "unit"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}},
]


@pytest.fixture(scope="module")
def client(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    folder = tmp_path_factory.mktemp("model") / "with-tools"
    folder.mkdir()
    for path in default_model.iterdir():
        if path.name not in ("chat_template.jinja", "manifest.json"):
            (folder / path.name).symlink_to(path)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    stack = Stack(folder, tmp_path_factory.mktemp("stack"), {"prefill": 1, "decode": 1}, ("--dtype", "float32"), None)
    with stack:
        yield openai.OpenAI(base_url=f"{stack.url}/v1", api_key="x", max_retries=0)


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
