"""The OpenAPI document is true: what it allows is answered as it says, whatever a generator of requests thinks of."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode, checks

from pdserve.request import FinishReason
from router.generation import Tokens
from router.http.app import make_app
from router.http.service import Service


async def test_tokens_and_text(client: httpx.AsyncClient) -> None:
    body = {"model": "tiny", "prompt": "hé<|im_end|>", "return_token_strs": True}
    answer = (await client.post("/tokenize", json=body)).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"]) == 4
    assert (answer["max_model_len"], answer["token_strs"][-1]) == (100, "<|im_end|>")
    text = await client.post("/detokenize", json={"model": "tiny", "tokens": answer["tokens"]})
    assert text.json() == {"prompt": "hé<|im_end|>"}
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "hey"}]}
    tokens = (await client.post("/tokenize", json=chat)).json()["tokens"]
    assert tokens[0] == 256
    for path, wrong, param in (
        ("/tokenize", {"model": "tiny"}, "prompt"),
        ("/tokenize", {"model": "x", "prompt": "a"}, "model"),
        ("/detokenize", {"model": "tiny", "tokens": [258]}, "tokens"),
        ("/detokenize", {"model": "tiny", "tokens": ["a"]}, "tokens[0]"),
    ):
        assert (await client.post(path, json=wrong)).json()["error"]["param"] == param


async def test_names_that_others_ask_for(client: httpx.AsyncClient, fleet: Any) -> None:
    for path in ("/health", "/ping", "/version", "/docs"):
        assert (await client.get(path)).status_code == 200
    assert set((await client.get("/version")).json()) == {"version"}
    fleet.error = RuntimeError()
    assert (await client.get("/ping")).status_code == 200


async def test_document_names_every_path_and_field(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize"):
        assert "post" in document["paths"][path]
    chat = document["components"]["schemas"]["ChatRequest"]
    assert chat["additionalProperties"] is False
    assert {"messages", "tools", "logit_bias", "response_format", "n"} <= chat["properties"].keys()
    assert chat["required"] == ["model", "messages"]


PATHS = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize"]
GETS = ["/v1/models", "/v1/models/{name}", "/livez", "/readyz", "/health", "/ping", "/version", "/workers"]


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["valid", "invalid"])
@pytest.mark.parametrize("path", PATHS + GETS)
@pytest.mark.filterwarnings("ignore")
def test_generated_requests_are_answered_as_the_document_says(
    service: Service, dispatcher: Any, path: str, mode: GenerationMode
) -> None:
    """No server error, only statuses and shapes that the document names."""
    dispatcher.script = [Tokens((39,), FinishReason.LENGTH)]
    schema = schemathesis.openapi.from_asgi("/openapi.json", make_app(service))
    operation = schema[path]["GET" if path in GETS else "POST"]

    @settings(max_examples=30, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: schemathesis.Case) -> None:
        case.call_and_validate(
            checks=[
                checks.not_a_server_error,
                *(checks.CHECKS.get_one(name) for name in ("status_code_conformance", "response_schema_conformance")),
            ]
        )

    if mode is GenerationMode.POSITIVE or path in PATHS:
        run()
