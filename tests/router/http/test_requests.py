"""What the dispatcher is asked for: prompt tokens, sampling, defaults, and neutral values of what is not there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import httpx
import pytest
import tokenizers
from tokenizers.processors import TemplateProcessing

from kvstore.keys import root_key
from pdserve.request import MAX_SEED, Request, SamplingParams
from router.http.app import make_app
from router.http.schema import MAX_MESSAGES
from router.http.service import ServedModel, Service
from router.text.tokenizer import Tokenizer

USER = [{"role": "user", "content": "hey"}]


@pytest.fixture
def ask(client: httpx.AsyncClient, dispatcher: Any) -> Any:
    """Sends a body (a `messages` key means chat) that must be accepted; returns the request that was dispatched."""

    async def send(body: dict[str, Any]) -> Request:
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        response = await client.post(path, json={"model": "tiny"} | body)
        assert response.status_code == 200, response.text
        request: Request = dispatcher.started[-1].request
        return request

    return send


async def test_defaults(ask: Any, model: ServedModel) -> None:
    text = await ask({"prompt": "hey"})
    assert text.prompt_token_ids == tuple(model.tokenizer.encode("hey", add_special=True))
    assert text.sampling == SamplingParams(max_tokens=16, seed=text.sampling.seed, stop_token_ids=(257,))
    assert text.root_key == root_key(b"fingerprint")
    chat = await ask({"messages": USER})
    assert chat.sampling.max_tokens == 100 - len(chat.prompt_token_ids)
    assert chat.request_id != text.request_id
    assert chat.sampling.seed != text.sampling.seed


async def test_default_length_shrinks_to_the_context(ask: Any) -> None:
    request = await ask({"prompt": "x" * 95})
    assert request.sampling.max_tokens == 5


async def test_sampling_parameters(ask: Any) -> None:
    request = await ask(
        {
            "prompt": "hey",
            "max_tokens": 7,
            "min_tokens": 2,
            "temperature": 1,
            "top_p": 0.5,
            "top_k": 9,
            "seed": 42,
            "stop_token_ids": [5, 257],
        }
    )
    assert request.sampling == SamplingParams(
        max_tokens=7, seed=42, temperature=1.0, top_p=0.5, top_k=9, min_tokens=2, stop_token_ids=(257, 5)
    )


async def test_special_values(ask: Any) -> None:
    assert (await ask({"prompt": "a", "seed": -1})).sampling.seed == MAX_SEED
    assert (await ask({"prompt": "a", "top_k": -1})).sampling.top_k == 0
    assert (await ask({"prompt": "a", "top_p": 0})).sampling.greedy
    assert (await ask({"prompt": "a", "temperature": 0})).sampling.greedy
    assert (await ask({"prompt": "a", "ignore_eos": True})).sampling.stop_token_ids == ()
    assert (await ask({"messages": USER, "max_completion_tokens": 3})).sampling.max_tokens == 3
    assert (await ask({"messages": USER, "max_tokens": 3})).sampling.max_tokens == 3


@pytest.mark.parametrize("prompt", [[1, 2, 3], [[1, 2, 3]]])
async def test_token_ids_as_prompt(ask: Any, prompt: list[Any]) -> None:
    assert (await ask({"prompt": prompt})).prompt_token_ids == (1, 2, 3)


async def test_one_prompt_in_a_list(ask: Any) -> None:
    assert (await ask({"prompt": ["hey"]})).prompt_token_ids == (await ask({"prompt": "hey"})).prompt_token_ids


async def test_messages_go_through_the_template(ask: Any, model: ServedModel) -> None:
    request = await ask(
        {
            "messages": [
                {"role": "developer", "content": "rules"},
                {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
                {"role": "assistant", "content": "", "refusal": None, "tool_calls": None, "annotations": []},
                {"role": "user", "content": "ok", "name": "ann"},
            ]
        }
    )
    text = (
        "<|im_start|>system\nrules<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
        "<|im_start|>user\nok<|im_end|>\n<|im_start|>assistant\n"
    )
    assert request.prompt_token_ids == tuple(model.tokenizer.encode(text, add_special=False))
    assert request.prompt_token_ids[0] == 256


async def test_beginning_token_is_added_to_bare_prompts_only(
    service: Service, dispatcher: Any, model: ServedModel
) -> None:
    """A chat template writes its own."""
    backend = tokenizers.Tokenizer.from_str(model.tokenizer._backend.to_str())
    backend.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 256)])
    app = make_app(replace(service, model=replace(model, tokenizer=Tokenizer(backend))))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front") as client:
        await client.post("/v1/completions", json={"model": "tiny", "prompt": "a"})
        await client.post("/v1/chat/completions", json={"model": "tiny", "messages": USER})
    text, chat = (generation.request.prompt_token_ids for generation in dispatcher.started)
    assert text[0] == 256
    assert (chat[0], chat.count(256)) == (256, 2)  # the user's turn and the assistant's


async def test_most_messages_are_accepted_by_the_schema(client: httpx.AsyncClient) -> None:
    """They are too long for the context, which is the next check."""
    body = {"model": "tiny", "messages": USER * MAX_MESSAGES}
    response = await client.post("/v1/chat/completions", json=body)
    assert response.json()["error"]["code"] == "context_length_exceeded"


NEUTRAL_BOTH = {
    "n": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "logit_bias": {},
    "user": "someone",
    "safety_identifier": "x",
    "stop": None,
    "seed": None,
    "max_tokens": None,
    "temperature": None,
    "stream": False,
    "stream_options": None,
    "repetition_penalty": 1.0,
    "skip_special_tokens": True,
    "min_p": 0.0,
}
NEUTRAL_TEXT = {"logprobs": None, "echo": False, "best_of": 1, "suffix": None}
NEUTRAL_CHAT = {
    "logprobs": False,
    "top_logprobs": None,
    "tools": [],
    "tool_choice": "none",
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "store": False,
    "metadata": None,
    "service_tier": "auto",
    "reasoning_effort": None,
}


@pytest.mark.parametrize(
    "body", [{"prompt": "a"} | NEUTRAL_TEXT, {"messages": USER} | NEUTRAL_CHAT], ids=["text", "chat"]
)
async def test_neutral_values_of_missing_parameters_are_accepted(ask: Any, body: dict[str, Any]) -> None:
    await ask(body | NEUTRAL_BOTH)


async def test_metadata_changes_nothing_up_to_its_limits(ask: Any) -> None:
    metadata = {f"{i:064}": "x" * 512 for i in range(16)}
    plain = await ask({"prompt": "a", "seed": 1})
    assert (await ask({"prompt": "a", "seed": 1, "metadata": metadata})).sampling == plain.sampling


async def test_long_prompts_take_the_other_thread(client: httpx.AsyncClient, dispatcher: Any) -> None:
    response = await client.post("/v1/completions", json={"model": "tiny", "prompt": "word " * 20_000})
    assert response.status_code == 400
    assert response.json()["error"] == {
        "message": "This model's maximum context length is 100 tokens. However, you requested 100001 tokens (100000 in "
        "the prompt, 1 in the completion). Please reduce the length of the prompt or completion.",
        "type": "invalid_request_error",
        "param": "prompt",
        "code": "context_length_exceeded",
    }
    assert dispatcher.started == []
