"""Tools through the front: what the template is given, what is forced, and calls in the answer, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from pdserve.request import FinishReason
from router.generation import Tokens
from router.http import conversation
from router.http.app import make_app
from router.http.service import ServedModel, Service
from router.text.chat_template import ChatTemplate

TEMPLATE = (
    "{% if tools %}T:{{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}\n{% endfor %}"
    "{% if enable_thinking %}think{% endif %}{% if add_generation_prompt %}a:{% endif %}"
)
TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
    },
    {"type": "function", "function": {"name": "now", "description": "the time"}},
]
USER = [{"role": "user", "content": "hey"}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


@pytest.fixture
def model_with_tools(model: ServedModel) -> ServedModel:
    return replace(model, chat_template=ChatTemplate(TEMPLATE, {}), max_model_len=2000)


@pytest.fixture
async def client(service: Service, model_with_tools: ServedModel) -> AsyncIterator[httpx.AsyncClient]:
    app = make_app(replace(service, model=model_with_tools))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front") as client:
        yield client


@pytest.fixture
def ask(client: httpx.AsyncClient, dispatcher: Any, model: ServedModel) -> Any:
    """Answers with `text`, 3 tokens at a time."""

    async def send(text: str, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
        ids = model.tokenizer.encode(text, add_special=False)
        pieces = [Tokens(tuple(ids[n : n + 3])) for n in range(0, len(ids), 3)]
        dispatcher.script = [*pieces, Tokens((257,), FinishReason.STOP)]
        messages = {} if path == "/v1/responses" else {"messages": USER}
        return await client.post(path, json={"model": "tiny"} | messages | body)

    return send


def prompt_of(dispatcher: Any, model: ServedModel) -> str:
    return model.tokenizer.decode(dispatcher.started[-1].request.prompt_token_ids)


async def test_call_in_the_answer(ask: Any, dispatcher: Any, model: ServedModel) -> None:
    answer = (await ask("Let me." + CALL, tools=TOOLS)).json()["choices"][0]
    assert answer["finish_reason"] == "tool_calls"
    assert answer["message"]["content"] == "Let me."
    [call] = answer["message"]["tool_calls"]
    assert (call["type"], call["function"]) == ("function", {"name": "add", "arguments": '{"a": 1}'})
    assert call["id"].startswith("call_")
    assert set(call) == {"id", "type", "function"}
    assert '"name": "add"' in prompt_of(dispatcher, model)
    assert dispatcher.started[-1].request.sampling.grammar is None


async def test_calls_in_a_stream(ask: Any) -> None:
    lines = (await ask(CALL + CALL, tools=TOOLS, stream=True)).text.splitlines()
    choices = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    calls = [call for choice in choices for call in choice["delta"].get("tool_calls", [])]
    assert [(call["index"], call["function"]["name"]) for call in calls] == [(0, "add"), (1, "add")]
    assert choices[-1]["finish_reason"] == "tool_calls"
    assert not any(choice["delta"].get("content") for choice in choices)


async def test_answer_without_a_call_is_text(ask: Any) -> None:
    answer = (await ask("No need.", tools=TOOLS)).json()["choices"][0]
    assert (answer["finish_reason"], answer["message"]["content"]) == ("stop", "No need.")
    assert "tool_calls" not in answer["message"]


async def test_none_leaves_the_tools_out(ask: Any, dispatcher: Any, model: ServedModel) -> None:
    answer = (await ask(CALL, tools=TOOLS, tool_choice="none")).json()["choices"][0]
    assert answer["message"]["content"] == CALL
    assert "T:" not in prompt_of(dispatcher, model)


@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", {"add", "now"}), ({"type": "function", "function": {"name": "now"}}, {"now"})],
)
async def test_forced_call_has_a_grammar(ask: Any, dispatcher: Any, choice: Any, names: set[str]) -> None:
    assert (await ask(CALL, tools=TOOLS, tool_choice=choice)).status_code == 200
    grammar = dispatcher.started[-1].request.sampling.grammar
    assert grammar.kind == "lark"
    assert {name for name in ("add", "now") if f'\\"{name}\\"' in grammar.source} == names


STRICT = {"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}


async def test_strict_functions_hold_an_answer_that_may_call(ask: Any, dispatcher: Any) -> None:
    """From where a call begins; of two functions each as it says."""
    answer = (await ask("Well." + CALL, tools=[STRICT, TOOLS[1]])).json()["choices"][0]
    assert answer["finish_reason"] == "tool_calls"
    grammar = dispatcher.started[-1].request.sampling.grammar
    assert "[lazy]" in grammar.source
    assert '"integer"' in grammar.source
    await ask("x", tools=[TOOLS[0], {**STRICT, "function": {**STRICT["function"], "name": "b"}}])
    assert dispatcher.started[-1].request.sampling.grammar.source.count('"integer"') == 1


async def test_at_most_one_call_where_they_may_not_be_parallel(ask: Any, dispatcher: Any) -> None:
    await ask("x", tools=TOOLS, parallel_tool_calls=False)
    assert "UNMARKED" in dispatcher.started[-1].request.sampling.grammar.source
    for body in ({"parallel_tool_calls": True}, {"parallel_tool_calls": False, "tool_choice": "none"}):
        await ask("x", tools=TOOLS, **body)
        assert dispatcher.started[-1].request.sampling.grammar is None


async def test_answer_in_a_format_may_call_too(ask: Any, dispatcher: Any) -> None:
    await ask("{}", tools=TOOLS, response_format={"type": "json_object"})
    assert dispatcher.started[-1].request.sampling.grammar.source.startswith("start: content | ")
    await ask("a", tools=TOOLS, guided_regex="a")
    assert dispatcher.started[-1].request.sampling.grammar.kind == "regex"


async def test_responses_are_strict_unless_they_say_otherwise(ask: Any, dispatcher: Any) -> None:
    function = {"type": "function", **TOOLS[0]["function"]}
    for strict, held in (({}, True), ({"strict": True}, True), ({"strict": None}, True), ({"strict": False}, False)):
        assert (await ask("x", path="/v1/responses", input="hey", tools=[function | strict])).status_code == 200
        assert (dispatcher.started[-1].request.sampling.grammar is not None) is held


async def test_schemas_of_all_tools_have_a_limit_together(
    ask: Any, dispatcher: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ask("x", tools=[STRICT, TOOLS[1]])
    size = len(dispatcher.started[-1].request.sampling.grammar.source)
    for limit, status in ((size, 200), (size - 1, 400)):
        monkeypatch.setattr(conversation, "MAX_GRAMMAR_BYTES", limit)
        response = await ask("x", tools=[STRICT, TOOLS[1]])
        assert response.status_code == status
    assert response.json()["error"]["param"] == "tools"


async def test_schema_of_a_tool_with_a_fault_is_named(ask: Any) -> None:
    tool = {"type": "function", "function": {"name": "a", "strict": True, "parameters": {"fault": 1}}}
    response = await ask("x", tools=[tool])
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")


async def test_wrong_uses_are_named(ask: Any) -> None:
    for body, param in (
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": 3}}}, "tool_choice.function.name"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name"),
        ({"tools": TOOLS, "tool_choice": {"type": "custom", "function": {"name": "now"}}}, "tool_choice.type"),
        ({"tools": TOOLS, "tool_choice": ["now"]}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
    ):
        response = await ask("x", **body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_conversation_with_a_call_and_its_result(ask: Any, dispatcher: Any, model: ServedModel) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
    ]
    assert (await ask("2", messages=messages, tools=TOOLS)).status_code == 200
    prompt = prompt_of(dispatcher, model)
    assert '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>' in prompt
    assert prompt.endswith("tool:2a:")


async def test_variables_of_the_template(ask: Any, dispatcher: Any, model: ServedModel) -> None:
    await ask("x", chat_template_kwargs={"enable_thinking": True})
    assert prompt_of(dispatcher, model).endswith("thinka:")
    for name in ("messages", "tools", "bos_token", "raise_exception", "nothing"):
        response = await ask("x", chat_template_kwargs={name: "x"})
        assert response.json()["error"]["param"] == "chat_template_kwargs"


async def test_model_card_says_that_it_calls_tools(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/models/tiny")).json()["capabilities"]["tools"] is True


async def test_responses_with_a_call(ask: Any) -> None:
    tools = [{"type": "function", **tool["function"]} for tool in TOOLS]
    answer = (await ask("Well." + CALL, path="/v1/responses", input="hey", tools=tools)).json()
    assert [item["type"] for item in answer["output"]] == ["message", "function_call"]
    assert (answer["output"][1]["name"], answer["output"][1]["arguments"]) == ("add", '{"a": 1}')
    items = [
        {"role": "user", "content": "hey"},
        {"type": "function_call", "call_id": "c", "name": "add", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "2"},
    ]
    assert (await ask("ok", path="/v1/responses", input=items, tools=tools)).json()["output"][0]["content"][0][
        "text"
    ] == "ok"
    lines = (await ask(CALL, path="/v1/responses", input="hey", tools=tools, stream=True)).text.splitlines()
    kinds = [line[7:] for line in lines if line.startswith("event: ")]
    assert "response.function_call_arguments.done" in kinds
    assert "response.output_text.delta" not in kinds
