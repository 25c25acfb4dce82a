"""Several choices of one request: samples of a prompt, batches of prompts, the best of many; all end as one."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from pdserve.errors import WorkerFailed
from pdserve.request import FinishReason, TokenLogprobs
from router.generation import Tokens

TEXT = {"model": "tiny", "prompt": "hey"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hey"}]}


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


def joined(text: str) -> dict[int, str]:
    """Text by choice of a stream."""
    texts: dict[int, str] = {}
    for event in events(text):
        for choice in event["choices"]:
            piece = choice["text"] if "text" in choice else choice["delta"].get("content", "")
            texts[choice["index"]] = texts.get(choice["index"], "") + piece
    return texts


@pytest.mark.parametrize("body", [TEXT, CHAT], ids=["completion", "chat"])
async def test_samples_of_a_prompt(client: httpx.AsyncClient, dispatcher: Any, body: dict[str, Any]) -> None:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    answer = (await client.post(path, json=body | {"n": 3, "seed": 7})).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [generation.request.sampling.seed for generation in dispatcher.started] == [7, 8, 9]
    assert len({generation.request.request_id for generation in dispatcher.started}) == 3
    assert answer["usage"]["completion_tokens"] == 3 * 9
    assert answer["usage"]["prompt_tokens"] == len(dispatcher.started[0].request.prompt_token_ids)
    stream = await client.post(path, json=body | {"n": 3, "stream": True})
    assert joined(stream.text) == dict.fromkeys(range(3), "Hi 🙂!")
    assert stream.text.count('"finish_reason":"stop"') == 3
    assert stream.text.endswith("data: [DONE]\n\n")
    assert stream.text.count("[DONE]") == 1


async def test_prompts_of_a_batch_keep_their_order_and_seed(client: httpx.AsyncClient, dispatcher: Any) -> None:
    body = TEXT | {"prompt": ["a", [1, 2], "ccc"], "n": 2, "seed": 5, "echo": True}
    answer = (await client.post("/v1/completions", json=body)).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    lengths = sorted((len(g.request.prompt_token_ids), g.request.sampling.seed) for g in dispatcher.started)
    assert lengths == [(1, 5), (1, 6), (2, 5), (2, 6), (3, 5), (3, 6)]
    assert [choice["text"][:3] for choice in answer["choices"]] == ["aHi", "aHi", '"#H', '"#H', "ccc", "ccc"]
    assert answer["usage"]["prompt_tokens"] == 1 + 2 + 3


async def test_samples_start_together_and_one_failure_ends_them(client: httpx.AsyncClient, dispatcher: Any) -> None:
    dispatcher.script = [None]
    sending = asyncio.create_task(client.post("/v1/completions", json=TEXT | {"n": 4}))
    await asyncio.sleep(0.05)
    assert len(dispatcher.started) == 4
    dispatcher.started[0].abort()
    assert (await sending).status_code == 502
    assert all(generation.aborted.is_set() for generation in dispatcher.started)


@pytest.mark.parametrize("stream", [True, False])
async def test_one_failure_ends_all(client: httpx.AsyncClient, dispatcher: Any, stream: bool) -> None:
    start = dispatcher.start

    def failing(request: Any, *args: Any) -> Any:
        dispatcher.script = [Tokens((39,)), WorkerFailed("gone") if request.request_id.endswith("-1") else None]
        return start(request, *args)

    dispatcher.start = failing
    response = await client.post("/v1/completions", json=TEXT | {"n": 3, "stream": stream})
    if stream:
        assert events(response.text)[-1]["error"]["message"] == "gone"
        assert "[DONE]" not in response.text
    else:
        assert response.status_code == 502
    assert all(generation.aborted.is_set() for generation in dispatcher.started)


async def test_best_of_keeps_the_likeliest(client: httpx.AsyncClient, dispatcher: Any) -> None:
    start, values = dispatcher.start, iter([-3.0, -1.0, -2.0])

    def scored(request: Any, *args: Any) -> Any:
        assert request.sampling.logprobs == 0
        dispatcher.script = [
            Tokens((39 + len(dispatcher.started),), FinishReason.LENGTH, (TokenLogprobs(next(values), 1, (), ()),))
        ]
        return start(request, *args)

    dispatcher.start = scored
    answer = (await client.post("/v1/completions", json=TEXT | {"n": 2, "best_of": 3})).json()
    assert [choice["text"] for choice in answer["choices"]] == ["I", "J"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == 3  # what was generated, kept or not


async def test_token_ids_are_returned_on_request(client: httpx.AsyncClient) -> None:
    body = {"return_token_ids": True}
    [text] = (await client.post("/v1/completions", json=TEXT | body)).json()["choices"]
    assert len(text["token_ids"]) == 9
    assert text["token_ids"][-1] == 257  # the stop token is one of them
    assert len(text["prompt_token_ids"]) == 3
    chat = (await client.post("/v1/chat/completions", json=CHAT | body)).json()
    assert chat["choices"][0]["token_ids"] == text["token_ids"]
    assert chat["prompt_token_ids"]
    stream = events((await client.post("/v1/completions", json=TEXT | body | {"stream": True})).text)
    told = [choice for event in stream for choice in event["choices"]]
    assert [token for choice in told for token in choice.get("token_ids", [])] == text["token_ids"]
    assert [choice.get("prompt_token_ids") for choice in told if "prompt_token_ids" in choice] == [
        text["prompt_token_ids"]
    ]


async def test_echo(client: httpx.AsyncClient, dispatcher: Any) -> None:
    [whole] = (await client.post("/v1/completions", json=TEXT | {"echo": True})).json()["choices"]
    assert whole["text"] == "heyHi 🙂!"
    stream = await client.post("/v1/completions", json=TEXT | {"echo": True, "stream": True})
    assert joined(stream.text) == {0: "heyHi 🙂!"}
    answer = (await client.post("/v1/completions", json=TEXT | {"echo": True, "max_tokens": 0})).json()
    assert (answer["choices"][0]["text"], answer["usage"]["completion_tokens"]) == ("hey", 0)
    assert dispatcher.started[-1].request.sampling.max_tokens == 1


async def test_stop_string_may_stay(client: httpx.AsyncClient) -> None:
    body = TEXT | {"stop": ["🙂"], "include_stop_str_in_output": True}
    [choice] = (await client.post("/v1/completions", json=body)).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("Hi 🙂", "stop")


async def test_special_tokens_may_be_written_out(client: httpx.AsyncClient, dispatcher: Any) -> None:
    dispatcher.script = [Tokens((39, 256, 39), FinishReason.LENGTH)]
    body = TEXT | {"skip_special_tokens": False}
    [choice] = (await client.post("/v1/completions", json=body)).json()["choices"]
    assert choice["text"] == "H<|im_start|>H"
