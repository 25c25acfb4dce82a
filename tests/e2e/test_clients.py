"""What users run works against the real processes: the README's examples, curl, the `openai` client, Prometheus."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.support.at_once import at_once
from tests.support.documented import blocks
from tests.support.stack import Stack, get_json, metric, scrape

pytestmark = pytest.mark.e2e

EXAMPLE_S = 120
# Greedy continuations of these are full of multi-byte characters.
EMOJI = "Repeat this line ten times:\n🦊🐻🦁🐼🐨\n🦊🐻🦁🐼🐨\n🦊🐻🦁🐼🐨\n🦊🐻"
CHINESE = "一二三四五六七八九十\n一二三四五六七八九十\n一二三"


def readme_examples(language: str) -> list[str]:
    """Code blocks of the README that talk to the server."""
    return [each.text for each in blocks(language) if each.page == "README.md" and "127.0.0.1:8000/v1" in each.text]


@pytest.fixture
def client(disaggregated: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{disaggregated.url}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def model(disaggregated: Stack) -> str:
    return disaggregated.model.name


def run(arguments: list[str]) -> str:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=EXAMPLE_S, check=True).stdout


# --- README ----------------------------------------------------------------------------------------------------------


def test_readme_has_both_examples() -> None:
    assert len(readme_examples("sh")) >= 1
    assert len(readme_examples("python")) >= 1


@pytest.mark.parametrize("example", readme_examples("sh"))
def test_readme_curl(disaggregated: Stack, example: str) -> None:
    answer = json.loads(run(["bash", "-ec", example.replace("http://127.0.0.1:8000", disaggregated.url)]))
    assert "physics" in answer["choices"][0]["message"]["content"]


@pytest.mark.parametrize("example", readme_examples("python"))
def test_readme_openai(disaggregated: Stack, example: str) -> None:
    assert run([sys.executable, "-c", example.replace("http://127.0.0.1:8000", disaggregated.url)]).strip()


# --- openai ----------------------------------------------------------------------------------------------------------


def test_chat_streamed_and_whole(client: openai.OpenAI, model: str) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is gravity?"}]
    whole = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=30)
    stream = client.chat.completions.create(
        model=model,
        messages=messages,
        temperature=0,
        max_tokens=30,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert whole.choices[0].message.content == text
    assert "physics" in text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert whole.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_completions_streamed_and_whole(client: openai.OpenAI, model: str) -> None:
    options: dict[str, Any] = {"model": model, "prompt": "The capital of Italy is", "temperature": 0, "max_tokens": 12}
    whole = client.completions.create(**options)
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**options, stream=True)]
    assert whole.choices[0].text == "".join(pieces)
    assert len(pieces) > 4, "it arrives piece by piece"


def test_models(client: openai.OpenAI, model: str) -> None:
    assert [card.id for card in client.models.list()] == [model]
    assert client.models.retrieve(model).id == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_a_bad_request_never_reaches_a_worker(client: openai.OpenAI, disaggregated: Stack, model: str) -> None:
    computed = disaggregated.workers["prefill-0"].metric("pdserve_computed_tokens_total")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model=model, prompt="x", temperature=-1)
    with pytest.raises(openai.BadRequestError, match="context length"):
        client.completions.create(model=model, prompt=[5] * 9000)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="another", prompt="x")
    assert disaggregated.workers["prefill-0"].metric("pdserve_computed_tokens_total") == computed


# --- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [EMOJI, CHINESE], ids=["emoji", "chinese"])
def test_streamed_utf8_is_never_cut(disaggregated: Stack, prompt: str) -> None:
    body = {"prompt": prompt, "max_tokens": 40}
    with disaggregated.client.stream(body) as stream:
        pieces, whole = at_once(lambda: list(stream), lambda: disaggregated.client.ask(body))
    assert "".join(pieces) == whole.text
    assert not any("\ufffd" in piece for piece in pieces[:-1])
    assert any(len(character.encode()) >= 3 for character in whole.text), "no character that could be cut"


def test_a_stop_string_ends_the_answer_and_is_not_in_it(disaggregated: Stack) -> None:
    body = {"prompt": "Count: one two three four five six", "max_tokens": 40}
    text = disaggregated.client.ask(body).text
    stop = text[len(text) // 2 :][:5]  # wherever its tokens begin and end
    expected = text[: text.index(stop)]
    with disaggregated.client.stream({**body, "stop": [stop, "never said"]}) as stream:
        streamed, stopped = at_once(lambda: "".join(stream), lambda: disaggregated.client.ask({**body, "stop": [stop]}))
    assert stopped.text == streamed == expected
    assert stopped.finish_reason == stream.finish_reason == "stop"
    disaggregated.assert_pools_whole(2.0)


# --- operators -------------------------------------------------------------------------------------------------------


def test_request_id_is_taken_and_returned(disaggregated: Stack) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", disaggregated.port, timeout=60)
    try:
        body = {"model": disaggregated.model.name, "prompt": "x", "max_tokens": 1}
        for headers in ({"X-Request-Id": "mine-1"}, {}):
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            response = connection.getresponse()
            response.read()
            assert response.status == 200
            assert response.headers["X-Request-Id"] == headers.get("X-Request-Id", response.headers["X-Request-Id"])
            assert response.headers["X-Request-Id"]
    finally:
        connection.close()


def test_health(disaggregated: Stack) -> None:
    bases = [disaggregated.url, *(f"http://{worker.admin_address}" for worker in disaggregated.living)]
    for base in bases:
        assert get_json(f"{base}/livez")
        assert get_json(f"{base}/readyz")


def test_metrics_move(disaggregated: Stack) -> None:
    def counts() -> dict[str, float]:
        names = [f"pdserve_{name}_seconds_count" for name in ("ttft", "tpot", "itl", "e2e")]
        return {
            **{name: metric(f"{disaggregated.url}/metrics", name) for name in names},
            "sent": prefill.metric("pdserve_transfer_bytes_total", direction="sent"),
            "received": decode.metric("pdserve_transfer_bytes_total", direction="received"),
        }

    prefill, decode = disaggregated.workers["prefill-0"], disaggregated.workers["decode-0"]
    before = counts()
    disaggregated.client.complete("These tokens nobody has sent before: zebra, quince, oboe.", max_tokens=4)
    after = counts()
    assert all(after[name] > before[name] for name in before), (before, after)
    assert after["sent"] - before["sent"] == after["received"] - before["received"]
    for worker in (prefill, decode):
        assert worker.metric("pdserve_kv_blocks") == worker.ledger()["total_blocks"]


def test_metrics_have_the_prefix_and_no_name_twice(disaggregated: Stack) -> None:
    pages = [f"{disaggregated.url}/metrics", *(f"http://{w.admin_address}/metrics" for w in disaggregated.living)]
    for page in pages:
        samples = [(sample.name, tuple(sorted(sample.labels.items()))) for sample in scrape(page)]
        assert len(samples) == len(set(samples)) > 0
        assert all(name.startswith(("pdserve_", "vllm:")) for name, _ in samples)
