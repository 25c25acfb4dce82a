"""One table of every parameter: the whole response is the same disaggregated and mixed, streamed or not."""

from __future__ import annotations

import json
import math
import re
import urllib.request
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from tests.support.at_once import at_once
from tests.support.passages import passage
from tests.support.stack import Stack

pytestmark = pytest.mark.e2e

# Of float32 logits, whose sums two deployments may add in different chunks.
TOLERANCE = 2e-5
PROMPT = passage(900, 3)
USER = [{"role": "user", "content": "Name three fruits."}]
SCHEMA = {
    "type": "object",
    "properties": {"fruit": {"type": "string", "maxLength": 12}, "count": {"type": "integer", "maximum": 99}},
    "required": ["fruit", "count"],
    "additionalProperties": False,
}
SAMPLED = {"temperature": 1.0, "seed": 11}

COMPLETIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seed": SAMPLED,
    "top_p": {**SAMPLED, "top_p": 0.6},
    "top_k": {**SAMPLED, "top_k": 3},
    "min_p": {**SAMPLED, "min_p": 0.2},
    "presence_penalty": {**SAMPLED, "presence_penalty": 1.5},
    "frequency_penalty": {"temperature": 0, "frequency_penalty": 2.0, "max_tokens": 24},
    "repetition_penalty": {"temperature": 0, "repetition_penalty": 1.5, "max_tokens": 24},
    "logit_bias": {"temperature": 0, "logit_bias": {"28": -100, "30": 5}},
    "min_tokens": {**SAMPLED, "min_tokens": 8},
    "max_tokens": {"temperature": 0, "max_tokens": 1},
    "stop": {"temperature": 0, "stop": [" the", "zzz"]},
    "stop_token_ids": {"temperature": 0, "stop_token_ids": list(range(20, 60))},
    "include_stop_str_in_output": {"temperature": 0, "stop": [" the"], "include_stop_str_in_output": True},
    "ignore_eos": {"temperature": 0, "ignore_eos": True},
    "skip_special_tokens": {**SAMPLED, "skip_special_tokens": False},
    "logprobs": {**SAMPLED, "logprobs": 5},
    "logprobs 0": {"temperature": 0, "logprobs": 0},
    "echo": {"temperature": 0, "echo": True},
    "echo with logprobs": {"temperature": 0, "echo": True, "logprobs": 2},
    "echo alone": {"max_tokens": 0, "echo": True, "logprobs": 1},
    "prompt_logprobs": {"temperature": 0, "prompt_logprobs": 2},
    "return_token_ids": {**SAMPLED, "return_token_ids": True},
    "n": {**SAMPLED, "n": 3},
    "best_of": {**SAMPLED, "best_of": 3, "n": 2},
    "prompts": {"prompt": [PROMPT, [504, 3575, 282], "One two"], **SAMPLED, "n": 2},
    "guided_regex": {**SAMPLED, "guided_regex": "[a-c]{3}-[0-9]{2}"},
    "guided_choice": {**SAMPLED, "guided_choice": ["yes", "no", "may be"]},
    "guided_grammar": {**SAMPLED, "guided_grammar": 'start: "a" | "b" start "c"'},
}
CHATS: dict[str, dict[str, Any]] = {
    "chat": {"temperature": 0},
    "chat logprobs": {**SAMPLED, "logprobs": True, "top_logprobs": 3},
    "chat n": {**SAMPLED, "n": 2, "logprobs": True},
    "json_object": {**SAMPLED, "response_format": {"type": "json_object"}},
    "json_schema": {
        **SAMPLED,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}},
        "max_tokens": 60,
    },
    "continue": {
        "messages": [*USER, {"role": "assistant", "content": "Apples, and"}],
        "continue_final_message": True,
        "temperature": 0,
    },
}
STREAMED_NOT = {"prompt_logprobs", "best_of"}  # which are refused with a stream


def body_of(name: str) -> tuple[str, dict[str, Any]]:
    if name in COMPLETIONS:
        return "/v1/completions", {"prompt": PROMPT, "max_tokens": 12} | COMPLETIONS[name]
    return "/v1/chat/completions", {"messages": USER, "max_tokens": 12} | CHATS[name]


def post(stack: Stack, path: str, body: dict[str, Any]) -> str:
    content = json.dumps({"model": stack.client.model} | body).encode()
    request = urllib.request.Request(stack.url + path, content, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return str(response.read().decode())


def ask(stack: Stack, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The response, without what is another's every time."""
    answer: dict[str, Any] = json.loads(post(stack, path, body))
    for name in ("id", "created"):
        del answer[name]
    del answer["usage"]["prompt_tokens_details"]  # what was cached depends on what was asked before
    return answer


def streamed(stack: Stack, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Text, finish reason and the told tokens by choice, and usage, of a stream."""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    text = post(stack, path, body | options)
    assert text.endswith("data: [DONE]\n\n")
    found: dict[str, Any] = {}
    for line in re.findall(r"^data: (\{.*)$", text, re.MULTILINE):
        event = json.loads(line)
        if event.get("usage"):
            found["usage"] = {key: value for key, value in event["usage"].items() if key != "prompt_tokens_details"}
        for choice in event["choices"]:
            mine = found.setdefault(choice["index"], {"text": "", "finish_reason": None, "logprobs": []})
            mine["text"] += choice["text"] if "text" in choice else choice["delta"].get("content", "")
            mine["finish_reason"] = choice["finish_reason"] or mine["finish_reason"]
            mine["logprobs"] += told(choice)
    return found


def told(choice: dict[str, Any]) -> list[Any]:
    logprobs = choice["logprobs"] or {}
    return logprobs.get("content") or logprobs.get("token_logprobs") or []


def in_short(answer: dict[str, Any]) -> dict[str, Any]:
    """A whole response as `streamed` has it."""
    found: dict[str, Any] = {"usage": answer["usage"]}
    for choice in answer["choices"]:
        found[choice["index"]] = {
            "text": choice["text"] if "text" in choice else choice["message"]["content"],
            "finish_reason": choice["finish_reason"],
            "logprobs": told(choice),
        }
    return found


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}[{index}]")
    else:
        yield path, value


def assert_same(one: Any, other: Any) -> None:
    left, right = dict(leaves(one)), dict(leaves(other))
    assert left.keys() == right.keys()
    for path, value in left.items():
        if isinstance(value, float):
            assert math.isclose(value, right[path], rel_tol=0, abs_tol=TOLERANCE), path
        else:
            assert value == right[path], path


@pytest.mark.parametrize("name", [*COMPLETIONS, *CHATS])
def test_same_response_in_every_mode(disaggregated: Stack, mixed: Stack, name: str) -> None:
    path, body = body_of(name)
    stacks = (mixed, disaggregated)
    whole, other = at_once(*(partial(ask, stack, path, body) for stack in stacks))
    assert_same(other, whole)
    if name not in STREAMED_NOT:
        for stream in at_once(*(partial(streamed, stack, path, body) for stack in stacks)):
            assert_same(stream, in_short(whole))


def test_logprobs_of_a_whole_text_are_those_of_its_parts(disaggregated: Stack) -> None:
    """What is said of an output token is what is said of it as a token of a prompt."""
    answer = ask(disaggregated, "/v1/completions", {"prompt": PROMPT, "temperature": 0, "max_tokens": 8, "logprobs": 1})
    output = answer["choices"][0]
    again = ask(
        disaggregated,
        "/v1/completions",
        {"prompt": PROMPT + output["text"], "max_tokens": 0, "echo": True, "logprobs": 1},
    )
    values = again["choices"][0]["logprobs"]["token_logprobs"][-len(output["logprobs"]["token_logprobs"]) :]
    assert values == pytest.approx(output["logprobs"]["token_logprobs"], abs=1e-3)


def test_structured_answers_are_what_was_asked_for(disaggregated: Stack) -> None:
    path, body = body_of("json_schema")
    for answer in at_once(*(partial(ask, disaggregated, path, body | {"seed": seed}) for seed in range(4))):
        found = json.loads(answer["choices"][0]["message"]["content"])
        assert set(found) == {"fruit", "count"}
        assert len(found["fruit"]) <= 12
        assert isinstance(found["count"], int)
    for name, pattern in (("guided_regex", "[a-c]{3}-[0-9]{2}"), ("guided_choice", "yes|no|may be")):
        path, body = body_of(name)
        assert re.fullmatch(pattern, ask(disaggregated, path, body)["choices"][0]["text"])


def test_samples_share_the_prompt(disaggregated: Stack) -> None:
    """One computes it; each of the others computes at most the block that its end lies in."""
    prompt = passage(950, 30)
    before = disaggregated.with_role("prefill")[0].metric("pdserve_computed_tokens_total")
    answer = ask(disaggregated, "/v1/completions", {"prompt": prompt, "n": 8, "max_tokens": 4, **SAMPLED})
    computed = disaggregated.with_role("prefill")[0].metric("pdserve_computed_tokens_total") - before
    prompt_tokens = answer["usage"]["prompt_tokens"]
    assert prompt_tokens <= computed <= prompt_tokens + 7 * 16


def test_samples_hold_the_blocks_of_the_prompt_once(disaggregated: Stack) -> None:
    """Eight decodes share its full blocks; each has the block of its end, and those of its output, to itself."""
    prompt, num_output = passage(951, 80), 48
    decode = disaggregated.with_role("decode")[0]
    body = {"prompt": prompt, "n": 8, "max_tokens": num_output, "ignore_eos": True, **SAMPLED}
    begun, held = set(), 0
    with disaggregated.client.send(body | {"stream": True}) as connection, connection.getresponse() as response:
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            begun |= {choice["index"] for choice in json.loads(line[6:])["choices"]}
            held = max(held, decode.blocks("held")) if len(begun) == 8 else held
    num_prompt = ask(disaggregated, "/v1/completions", body | {"max_tokens": 1})["usage"]["prompt_tokens"]
    shared, own = num_prompt // 16, 8 * (2 + num_output // 16)
    assert shared > own, "sharing would not show"
    assert shared < held <= shared + own


def test_a_sample_is_the_request_with_its_seed(disaggregated: Stack) -> None:
    """So no sample writes into what another reads."""
    body = {"prompt": PROMPT, "max_tokens": 20, "temperature": 1.0, "seed": 40, "logprobs": 1}
    samples = ask(disaggregated, "/v1/completions", body | {"n": 8})["choices"]
    assert len({sample["text"] for sample in samples}) > 4
    for i in (0, 3, 7):
        [alone] = ask(disaggregated, "/v1/completions", body | {"seed": 40 + i})["choices"]
        assert_same(samples[i] | {"index": 0}, alone)
