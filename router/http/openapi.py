"""The OpenAPI document of this server, made from the models that requests are checked with, so that it is true."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from pdserve import __version__
from router.http.responses_call import ResponsesRequest
from router.http.schema import ChatRequest, CompletionRequest
from router.http.service import ServedModel
from router.http.tokens import DetokenizeRequest, TokenizeRequest

Payload = dict[str, Any]

_BODIES: list[type[BaseModel]] = [
    *(ChatRequest, CompletionRequest, ResponsesRequest, TokenizeRequest, DetokenizeRequest),
]
_POSTS: list[tuple[str, str, list[type[BaseModel]], bool]] = [
    ("/v1/chat/completions", "Answer a conversation", [ChatRequest], True),
    ("/v1/completions", "Continue a text", [CompletionRequest], True),
    ("/v1/responses", "Answer an input; stateless, text only", [ResponsesRequest], True),
    ("/tokenize", "Text or messages to token ids", [TokenizeRequest, ChatRequest], False),
    ("/detokenize", "Token ids to text", [DetokenizeRequest], False),
    ("/v1/route:dryrun", "Where a request would go, and why; runs nothing", [ChatRequest, CompletionRequest], False),
]
_GETS = [
    ("/v1/models", "The models that are served, with their limits"),
    ("/v1/models/{name}", "One model"),
    ("/v1/requests", "The last requests and what was decided for them"),
    ("/v1/requests/{request_id}/explain", "Why a request went where it went, and what it took"),
    ("/v1/slo", "Live goodput by class"),
    ("/v1/topology", "Workers and the links between them"),
    ("/workers", "The fleet"),
    ("/livez", "The process runs"),
    ("/readyz", "A worker can take requests"),
    ("/health", "As /readyz, under the name that vLLM has"),
    ("/ping", "As /livez, under the name that load balancers ask for"),
    ("/version", "The version of the server"),
]
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_REF = "#/components/schemas/{model}"
_ANSWERS = {
    "400": "The request is wrong; `param` names the field",
    "404": "There is no such model or request",
    "408": "The request did not arrive in time",
    "413": "The body is too large",
    "429": "Too much is asked for at the moment; see Retry-After",
    "431": "The headers are too large",
    "500": "The server is at fault",
    "502": "The workers failed",
    "503": "No worker can take the request now; see Retry-After",
    "504": "The request took too long",
}


def openapi_document(model: ServedModel) -> Payload:
    """JSON-ready, OpenAPI 3.1."""
    _, definitions = models_json_schema([(body, "validation") for body in _BODIES], ref_template=_REF)
    schemas = {**definitions["$defs"], "Error": _ERROR}
    for body in _BODIES:
        schemas[body.__name__]["properties"]["model"] = {"const": model.name}
    paths: Payload = {path: {"get": _operation(summary, path, None, stream=False)} for path, summary in _GETS}
    for path, summary, bodies, streams in _POSTS:
        paths[path] = {"post": _operation(summary, path, bodies, stream=streams)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "pdserve", "version": __version__, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _operation(summary: str, path: str, bodies: list[type[BaseModel]] | None, *, stream: bool) -> Payload:
    content: Payload = {"application/json": {"schema": {"type": "object"}}}
    if stream:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    error = {"content": {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}}}
    operation: Payload = {
        "summary": summary,
        "responses": {
            "200": {"description": "OK", "content": content},
            **{status: {"description": text, **error} for status, text in _ANSWERS.items()},
        },
    }
    if path in ("/readyz", "/health"):
        operation["responses"]["503"] = {"description": "Not ready", "content": content}
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    if names:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if bodies is not None:
        refs = [{"$ref": _REF.format(model=body.__name__)} for body in bodies]
        schema = refs[0] if len(refs) == 1 else {"anyOf": refs}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation
