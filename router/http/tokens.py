"""Text to tokens and back, as the model sees it; in vLLM's shapes."""

from __future__ import annotations

import asyncio
from typing import Any

from pdserve.errors import InvalidRequest
from router.http.body import decode_body
from router.http.call import check_model, check_token_ids
from router.http.conversation import prompt_text, tooling_of
from router.http.exchange import Exchange
from router.http.json_endpoint import JsonEndpoint
from router.http.schema import Strict, parse, parse_chat
from router.http.service import Service


class TokenizeRequest(Strict):
    model: str
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    model: str
    tokens: list[int]


class TokenizeEndpoint(JsonEndpoint):
    """A `prompt`, or `messages` with all that a chat completion may have beside them."""

    def __init__(self, service: Service) -> None:
        super().__init__(service.limits)
        self._model = service.model

    async def answer(self, body: bytes, exchange: Exchange) -> dict[str, Any]:
        return await asyncio.to_thread(self._tokenize, decode_body(body))

    def _tokenize(self, fields: dict[str, Any]) -> dict[str, Any]:
        model = self._model
        with_texts = fields.get("return_token_strs") is True
        if "messages" in fields:
            request = parse_chat({name: value for name, value in fields.items() if name != "return_token_strs"})
            check_model(request.model, model)
            if model.chat_template is None:
                raise InvalidRequest(f"The model '{model.name}' has no chat template.", param="messages")
            text, add_special = prompt_text(request, model.chat_template, tooling_of(request, model)), False
        else:
            bare = parse(TokenizeRequest, fields)
            check_model(bare.model, model)
            text, add_special = bare.prompt, bare.add_special_tokens is not False
        tokens = model.tokenizer.encode(text, add_special=add_special)
        answer: dict[str, Any] = {"count": len(tokens), "max_model_len": model.max_model_len, "tokens": tokens}
        if with_texts:
            answer["token_strs"] = [model.tokenizer.literal(token_id).decode(errors="replace") for token_id in tokens]
        return answer


class DetokenizeEndpoint(JsonEndpoint):
    def __init__(self, service: Service) -> None:
        super().__init__(service.limits)
        self._model = service.model

    async def answer(self, body: bytes, exchange: Exchange) -> dict[str, Any]:
        request = parse(DetokenizeRequest, decode_body(body))
        check_model(request.model, self._model)
        check_token_ids(request.tokens, self._model, "tokens")
        literals = [self._model.tokenizer.literal(token_id) for token_id in request.tokens]
        return {"prompt": b"".join(literals).decode(errors="replace")}
