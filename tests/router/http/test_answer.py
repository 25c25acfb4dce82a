"""The text of an answer: stop strings cut it, stop tokens are not in it, and the tokens are counted up to its end."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from pdserve.request import FinishReason
from router.generation import Tokens
from router.http.service import ServedModel


@pytest.fixture
def complete(client: httpx.AsyncClient, dispatcher: Any, model: ServedModel) -> Any:
    """Answers with `text`, `size` tokens at a time; returns (text, finish reason, completion tokens, aborted)."""

    async def send(text: str, size: int, finish: Tokens, **body: Any) -> tuple[str, str, int]:
        ids = model.tokenizer.encode(text, add_special=False)
        dispatcher.script = [*(Tokens(tuple(ids[n : n + size])) for n in range(0, len(ids), size)), finish]
        response = await client.post("/v1/completions", json={"model": "tiny", "prompt": "a"} | body)
        choice = response.json()["choices"][0]
        return choice["text"], choice["finish_reason"], response.json()["usage"]["completion_tokens"]

    return send


LENGTH = Tokens((), FinishReason.LENGTH)


@pytest.mark.parametrize("size", [1, 2, 5, 100])
async def test_stop_string_cuts_text_and_count_and_finishes(complete: Any, dispatcher: Any, size: int) -> None:
    """The script goes on after the stop string: nothing of that is read."""
    assert await complete("one two three", size, LENGTH, stop="two") == ("one ", "stop", 7)
    assert dispatcher.started[-1].finished


@pytest.mark.parametrize("size", [1, 3, 100])
async def test_near_miss_is_given_out_at_the_end(complete: Any, size: int) -> None:
    assert await complete("one tw", size, LENGTH, stop=["two", "xyz"]) == ("one tw", "length", 6)


async def test_stop_string_before_min_tokens_is_text(complete: Any) -> None:
    assert await complete("a.b.c", 1, LENGTH, stop=".", min_tokens=2) == ("a.b", "stop", 4)


async def test_stop_token_is_counted_but_no_text(complete: Any, model: ServedModel) -> None:
    stop_id = model.tokenizer.encode("!", add_special=False)[0]
    finish = Tokens((stop_id,), FinishReason.STOP)
    assert await complete("ab", 1, finish, stop_token_ids=[stop_id]) == ("ab", "stop", 3)
    assert await complete("ab", 1, finish, stop_token_ids=[stop_id], stop="b!") == ("ab", "stop", 3)


async def test_last_token_of_the_length_is_text(complete: Any, model: ServedModel) -> None:
    last = model.tokenizer.encode("!", add_special=False)[0]
    assert await complete("ab", 1, Tokens((last,), FinishReason.LENGTH), stop_token_ids=[last]) == ("ab!", "length", 3)


async def test_cut_character_at_the_end_is_replaced(complete: Any, model: ServedModel) -> None:
    cut = tuple(model.tokenizer.encode("🙂", add_special=False)[:2])
    assert await complete("a", 1, Tokens(cut, FinishReason.LENGTH)) == ("a\ufffd", "length", 3)
    assert await complete("a", 1, Tokens(cut, FinishReason.LENGTH), stop="zz") == ("a\ufffd", "length", 3)


async def test_stop_string_never_leaks_into_a_stream(
    client: httpx.AsyncClient, dispatcher: Any, model: ServedModel
) -> None:
    ids = model.tokenizer.encode("abENxEND", add_special=False)
    dispatcher.script = [*(Tokens((n,)) for n in ids), LENGTH]
    body = {"model": "tiny", "prompt": "a", "stop": "END", "stream": True}
    response = await client.post("/v1/completions", json=body)
    pieces = [event.split('"text":"')[1].split('"')[0] for event in response.text.split("\n\n")[:-2]]
    assert pieces == ["a", "b", "ENx", ""]
    assert '"finish_reason":"stop"' in response.text
