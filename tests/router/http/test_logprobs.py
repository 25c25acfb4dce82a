"""Log probabilities reach the client in OpenAI's shapes: chosen token, likeliest, bytes, offsets; the prompt's too."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from pdserve.request import FinishReason, TokenLogprobs
from router.generation import Tokens

TEXT = {"model": "tiny", "prompt": "hey"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hey"}]}


def told(logprob: float, *top: tuple[int, float]) -> TokenLogprobs:
    return TokenLogprobs(logprob, 1 + len(top), tuple(i for i, _ in top), tuple(value for _, value in top))


@pytest.fixture
def script(dispatcher: Any, model: Any) -> list[int]:
    """ "H", then the four tokens of a smile, then the stop token, each with its log probability."""
    ids: list[int] = [*model.tokenizer.encode("H🙂", add_special=False), 257]
    dispatcher.script = [
        Tokens((ids[0],), None, (told(-0.5, (ids[0], -0.5), (256, -1.5)),)),
        Tokens(tuple(ids[1:4]), None, tuple(told(-float(i), (ids[i], -float(i))) for i in range(1, 4))),
        Tokens(tuple(ids[4:]), FinishReason.STOP, (told(-4.0, (ids[4], -4.0)), told(-9.0))),
    ]
    return ids


async def test_chat(client: httpx.AsyncClient, dispatcher: Any, script: list[int]) -> None:
    body = CHAT | {"logprobs": True, "top_logprobs": 2}
    [choice] = (await client.post("/v1/chat/completions", json=body)).json()["choices"]
    content = choice["logprobs"]["content"]
    assert dispatcher.started[0].request.sampling.logprobs == 2
    assert [entry["logprob"] for entry in content] == [-0.5, -1, -2, -3, -4]  # the stop token is no content
    assert content[0] == {
        "token": "H",
        "logprob": -0.5,
        "bytes": [72],
        "top_logprobs": [
            {"token": "H", "logprob": -0.5, "bytes": [72]},
            {"token": "<|im_start|>", "logprob": -1.5, "bytes": list(b"<|im_start|>")},
        ],
    }
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == choice["message"]["content"] == "H🙂"


async def test_stream_tells_the_same_as_the_whole(client: httpx.AsyncClient, script: list[int]) -> None:
    body = CHAT | {"logprobs": True, "top_logprobs": 1}
    whole = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]["logprobs"]["content"]
    lines = (await client.post("/v1/chat/completions", json=body | {"stream": True})).text.splitlines()
    chunks = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    streamed = [entry for chunk in chunks if chunk["logprobs"] for entry in chunk["logprobs"]["content"]]
    assert streamed == whole


async def test_completion(client: httpx.AsyncClient, script: list[int]) -> None:
    [choice] = (await client.post("/v1/completions", json=TEXT | {"logprobs": 2})).json()["choices"]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["H", "bytes:\\xf0", "bytes:\\x9f", "bytes:\\x99", "bytes:\\x82"]
    assert logprobs["token_logprobs"] == [-0.5, -1, -2, -3, -4]
    assert logprobs["top_logprobs"][0] == {"H": -0.5, "<|im_start|>": -1.5}
    assert logprobs["text_offset"] == [0, 1, 1, 1, 1]


async def test_echo_tells_of_the_prompt(client: httpx.AsyncClient, dispatcher: Any, model: Any) -> None:
    ids = model.tokenizer.encode("hey", add_special=False)
    dispatcher.script = [
        Tokens((39,), FinishReason.LENGTH, (told(-1.0),), (told(-2.0, (0, -0.1)), told(-3.0, (1, -0.2))))
    ]
    for max_tokens, tokens, values in ((1, [*"hey", "H"], [None, -2, -3, -1]), (0, [*"hey"], [None, -2, -3])):
        body = TEXT | {"echo": True, "logprobs": 1, "max_tokens": max_tokens}
        logprobs = (await client.post("/v1/completions", json=body)).json()["choices"][0]["logprobs"]
        assert dispatcher.started[-1].request.sampling.prompt_logprobs == 1
        assert (logprobs["tokens"], logprobs["token_logprobs"]) == (tokens, values)
        assert logprobs["text_offset"] == list(range(len(tokens)))
        assert logprobs["top_logprobs"][:2] == [None, {"!": -0.1, "e": -2.0}]
    assert len(ids) == 3


async def test_prompt_logprobs(client: httpx.AsyncClient, dispatcher: Any, model: Any) -> None:
    ids = model.tokenizer.encode("hey", add_special=False)
    dispatcher.script = [Tokens((39,), FinishReason.LENGTH, (), (told(-2.0, (0, -0.1)), told(-0.3, (ids[2], -0.3))))]
    body = TEXT | {"prompt_logprobs": 1}
    [choice] = (await client.post("/v1/completions", json=body)).json()["choices"]
    assert choice["prompt_logprobs"] == [
        None,
        {
            "0": {"logprob": -0.1, "rank": 1, "decoded_token": "!"},
            str(ids[1]): {"logprob": -2.0, "rank": 2, "decoded_token": "e"},
        },
        {str(ids[2]): {"logprob": -0.3, "rank": 2, "decoded_token": "y"}},
    ]
    assert choice["logprobs"] is None


async def test_tokens_behind_a_stop_string_are_not_told(client: httpx.AsyncClient, script: list[int]) -> None:
    body = CHAT | {"logprobs": True, "stop": ["H"]}
    [choice] = (await client.post("/v1/chat/completions", json=body)).json()["choices"]
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == ["H"]
