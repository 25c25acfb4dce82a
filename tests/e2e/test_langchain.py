"""LangChain's clients of OpenAI work as they come: `ChatOpenAI` and `OpenAI`, whole, streamed, in batches."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage
from langchain_openai import ChatOpenAI, OpenAI
from openai import DefaultAsyncHttpxClient
from pydantic import BaseModel, SecretStr

from tests.support.stack import Stack
from tests.support.tool_model import SHOWN, STRICT, assert_holds

pytestmark = pytest.mark.e2e

QUESTION = "What is gravity?"


class City(BaseModel):
    name: str


def server(stack: Stack) -> dict[str, Any]:
    """Few tokens: `OpenAI` would ask for 256, which takes a small machine long."""
    return {
        "base_url": f"{stack.url}/v1",
        "api_key": SecretStr("unused"),
        "model": stack.model.name,
        "temperature": 0,
        "max_retries": 0,
        "max_tokens": 20,
    }


@pytest.fixture
def chat(disaggregated: Stack) -> ChatOpenAI:
    return ChatOpenAI(**server(disaggregated))


@pytest.fixture
def completions(disaggregated: Stack) -> OpenAI:
    return OpenAI(**server(disaggregated))


def test_chat(chat: ChatOpenAI) -> None:
    whole = chat.invoke(QUESTION)
    assert whole.text
    assert whole.text == "".join(chunk.text for chunk in chat.stream(QUESTION))
    answers = chat.batch(["Hi", QUESTION])
    assert answers[1].text == whole.text
    assert isinstance(answers[0], AIMessage)
    assert answers[0].usage_metadata is not None
    assert answers[0].usage_metadata["output_tokens"] > 0


async def test_chat_in_a_loop(disaggregated: Stack) -> None:
    async with DefaultAsyncHttpxClient() as http:  # its own would outlive the loop
        chat = ChatOpenAI(**server(disaggregated), http_async_client=http)
        whole = (await chat.ainvoke(QUESTION)).text
        assert whole == "".join([chunk.text async for chunk in chat.astream(QUESTION)])


def test_chat_with_logprobs(chat: ChatOpenAI) -> None:
    answer = chat.bind(logprobs=True, top_logprobs=2).invoke("Hi")
    content = answer.response_metadata["logprobs"]["content"]
    assert all(len(token["top_logprobs"]) == 2 for token in content)


def test_structured_answer(chat: ChatOpenAI) -> None:
    found = chat.with_structured_output(City, method="json_schema").invoke("Name a city as JSON.")
    assert isinstance(found, City)


def test_responses_api(disaggregated: Stack) -> None:
    assert ChatOpenAI(**server(disaggregated), use_responses_api=True, store=False).invoke(QUESTION).text


def test_tools(with_tools: Stack) -> None:
    """A call that the model makes by itself, whole and streamed, and structured output by a forced call."""
    chat = ChatOpenAI(**server(with_tools) | {"max_tokens": 60})
    roles: dict[str, type[BaseMessage]] = {"user": HumanMessage, "assistant": AIMessage}
    messages = [roles[message["role"]](content=message["content"]) for message in SHOWN]
    taught = chat.bind_tools([STRICT])
    [call] = taught.invoke(messages).tool_calls
    assert call["name"] == "get_weather"
    merged: AIMessageChunk | None = None
    for chunk in taught.stream(messages):
        assert isinstance(chunk, AIMessageChunk)
        merged = chunk if merged is None else merged + chunk
    assert merged is not None
    assert merged.tool_call_chunks[0]["args"] is not None
    assert_holds(merged.tool_call_chunks[0]["args"])
    assert merged.tool_calls[0]["args"] == call["args"]
    found = chat.with_structured_output(City, method="function_calling").invoke("Name a city.")
    assert isinstance(found, City)


def test_completions(completions: OpenAI) -> None:
    prompt = "The capital of Italy is"
    whole = completions.invoke(prompt)
    assert "Rome" in whole
    assert whole == "".join(completions.stream(prompt))
    assert completions.batch([prompt, "One two"])[0] == whole
    assert completions.bind(stop=["Rome"]).invoke(prompt) == " "


async def test_completions_in_a_loop(disaggregated: Stack) -> None:
    prompt = "The capital of Italy is"
    async with DefaultAsyncHttpxClient() as http:
        completions = OpenAI(**server(disaggregated), http_async_client=http)
        whole = await completions.ainvoke(prompt)
        assert whole == "".join([chunk async for chunk in completions.astream(prompt)])


def test_batch_of_its_usual_size(disaggregated: Stack) -> None:
    """It sends 20 prompts in one request."""
    prompts = [f"{n} and" for n in range(20)]
    found = OpenAI(**server(disaggregated) | {"max_tokens": 2}).generate(prompts)
    assert len(found.generations) == 20
    assert all(len(choices) == 1 and choices[0].text for choices in found.generations)
    assert found.llm_output is not None
    assert found.llm_output["token_usage"]["completion_tokens"] <= 40
