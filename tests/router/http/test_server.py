"""On a real socket: the `openai` client works, and a closed connection aborts."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from pdserve.request import FinishReason
from router.generation import Tokens
from router.http.app import make_app
from router.http.service import ServedModel, Service
from router.text.chat_template import ChatTemplate
from router.text.tokenizer import Tokenizer

TEXT = "Olá, 世界! 🦊 is a fox."
USER: list[Any] = [{"role": "user", "content": "hey"}]


def serve(service: Service) -> Iterator[str]:
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make_app(service), log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        listener.close()
        assert not thread.is_alive()


@pytest.fixture
def url(service: Service) -> Iterator[str]:
    yield from serve(service)


@pytest.fixture
def real_model(default_model: Path, model: ServedModel) -> ServedModel:
    tokenizer = Tokenizer.from_folder(default_model)
    template = ChatTemplate.from_folder(default_model)
    return replace(
        model,
        tokenizer=tokenizer,
        chat_template=template,
        max_model_len=8192,
        vocab_size=tokenizer.vocab_size,
        eos_token_ids=(2,),
    )


@pytest.fixture
def real_url(service: Service, real_model: ServedModel, dispatcher: Any) -> Iterator[str]:
    """With the tokeniser and template of the default model; answers `TEXT`."""
    ids = real_model.tokenizer.encode(TEXT, add_special=False)
    dispatcher.script = [*(Tokens((n,)) for n in ids), Tokens((2,), FinishReason.STOP)]
    yield from serve(replace(service, model=real_model))


@pytest.fixture
def client(real_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{real_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_openai_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=USER)
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert answer._request_id is not None


def test_openai_chat_repeats_an_answer(client: openai.OpenAI, dispatcher: Any) -> None:
    """The message object of an answer is accepted as part of the next turn."""
    answer = client.chat.completions.create(model="tiny", messages=USER).choices[0].message
    follow_up: list[Any] = [*USER, answer, *USER]
    assert client.chat.completions.create(model="tiny", messages=follow_up).choices[0].message.content == TEXT
    assert len(dispatcher.started) == 2


def test_openai_chat_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny", messages=USER, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == TEXT
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].choices == []
    assert all("\ufffd" not in chunk.to_json() for chunk in chunks)


def test_openai_completions(client: openai.OpenAI) -> None:
    assert client.completions.create(model="tiny", prompt="hey", stop=[" fox"]).choices[0].text == "Olá, 世界! 🦊 is a"
    stream = client.completions.create(model="tiny", prompt=[1, 2, 3], stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == TEXT


def test_openai_models_and_errors(client: openai.OpenAI) -> None:
    assert [card.id for card in client.models.list()] == ["tiny"]
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="other", messages=USER)
    with pytest.raises(openai.BadRequestError, match="less than or equal to 8") as caught:
        client.chat.completions.create(model="tiny", messages=USER, n=9)
    assert caught.value.param == "n"


@pytest.mark.parametrize("stream", [True, False])
def test_closed_connection_aborts(url: str, dispatcher: Any, stream: bool) -> None:
    dispatcher.script = [Tokens((39,)), None]
    body = {"model": "tiny", "prompt": "hey", "stream": stream}
    if stream:
        with httpx.stream("POST", f"{url}/v1/completions", json=body) as response:
            next(response.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/completions", json=body, timeout=0.2)
    assert dispatcher.started[0].ended.wait(timeout=5)


def test_client_that_stops_reading_aborts(service: Service, dispatcher: Any) -> None:
    """Kernel and server buffer a bounded amount; then the write stalls."""
    dispatcher.script = [Tokens((39,) * 10_000)] * 5_000
    for url in serve(replace(service, limits=replace(service.limits, write_stall_s=0.3))):
        body = b'{"model":"tiny","prompt":"hey","stream":true}'
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as client:
            client.sendall(head + body)
            client.recv(1)
            assert dispatcher.started[0].ended.wait(timeout=20)
        assert dispatcher.started[0].timeline.output_tokens < 50_000_000


def test_connection_serves_again_after_an_error_and_a_stream(url: str) -> None:
    with httpx.Client(base_url=url) as client:
        for _ in range(2):
            assert client.post("/v1/completions", content=b"{").status_code == 400
            stream = client.post("/v1/completions", json={"model": "tiny", "prompt": "a", "stream": True})
            assert stream.text.endswith("data: [DONE]\n\n")
