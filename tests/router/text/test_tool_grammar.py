"""Free text until a call begins, then the function's schema to its end: in each format, marks as text or as tokens."""

from __future__ import annotations

import json
import random
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from pdserve.engine.grammar import TokenGrammar
from pdserve.grammars import Grammars
from pdserve.request import Grammar
from router.text.tokenizer import Tokenizer
from router.text.tool_calls import ToolCallParser, ToolCallText
from router.text.tool_formats import HERMES, LLAMA3, MISTRAL, MISTRAL_NAMED, ToolFormat
from router.text.tool_grammar import Callee, calls_or_json, forced_calls, free_calls

FORMATS = {"hermes": HERMES, "mistral": MISTRAL, "mistral_named": MISTRAL_NAMED, "llama3": LLAMA3}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 5}, "unit": {"$ref": "#/$defs/unit"}},
    "required": ["city", "unit"],
    "additionalProperties": False,
    "$defs": {"unit": {"enum": ["c", "f"]}},
    "x-guidance": {"whitespace_flexible": True},  # not for the client to say
}
CALLEES = [
    Callee("weather", SCHEMA),
    Callee("now", {"type": "object", "properties": {}, "additionalProperties": False}),
]
# What begins a call, as far as the grammar has not taken over.
BEGIN = {"hermes": "<tool_call>", "mistral": "[TOOL_CALLS]", "mistral_named": "[TOOL_CALLS]", "llama3": '{"name"'}
END = "</s>"


class Bench:
    """A tokeniser of bytes, in which the marks are text or special tokens, and grammars for it."""

    def __init__(self, folder: Path, *, special: bool) -> None:
        pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = tokenizers.Tokenizer(models.BPE(vocab={piece: n for n, piece in enumerate(pieces)}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        marks = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"] if special else []
        backend.add_special_tokens([END, "<think>", *marks])
        backend.save(str(folder / "tokenizer.json"))
        self.tokenizer = Tokenizer(backend)
        self.eos = [self.tokenizer.encode(END, add_special=False)[0]]
        self.grammars = Grammars(folder / "tokenizer.json", self.tokenizer.vocab_size, self.eos)

    def free(self, name: str, *, several: bool = True, callees: list[Callee] = CALLEES) -> Grammar:
        return free_calls(FORMATS[name], callees, self.tokenizer, self.eos, several=several)

    def begun(self, grammar: Grammar) -> TokenGrammar:
        compiled: Future[Any] = Future()
        compiled.set_result(self.grammars.compile(grammar))
        return TokenGrammar(compiled)

    def allowed(self, state: TokenGrammar) -> list[int]:
        mask = state.allowed()
        return [token for token in range(self.tokenizer.vocab_size) if mask is None or mask[token]]

    def takes(self, grammar: Grammar, text: str) -> bool:
        """Whether it may be the whole answer."""
        state = self.begun(grammar)
        state.follow(self.tokenizer.encode(text, add_special=False))
        return not state.failed and (state.ended or self.eos[0] in self.allowed(state))

    def read(self, tool_format: ToolFormat, text: str) -> tuple[str, list[ToolCallText]]:
        parser = ToolCallParser(tool_format)
        said, calls = parser.push(text)
        rest, more = parser.flush()
        return said + rest, calls + more


@pytest.fixture(scope="module", params=[False, True], ids=["text", "special"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("tokenizer"), special=request.param)


def assert_valid(call: ToolCallText) -> None:
    arguments = json.loads(call.arguments)
    if call.name == "now":
        assert arguments == {}
        return
    assert call.name == "weather"
    assert set(arguments) == {"city", "unit"}
    assert len(arguments["city"]) <= 5
    assert arguments["unit"] in ("c", "f")


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=25)
@given(said=st.text(alphabet="a <{[\n\u00e9\U0001f642", max_size=8), seed=st.integers(0, 10**6))
def test_what_is_begun_ends_as_a_valid_call(bench: Bench, name: str, said: str, seed: int) -> None:
    """Whatever is drawn of what is allowed behind the beginning of a call, and wherever the request goes on."""
    said = "" if name == "llama3" else said
    rng = random.Random(seed)
    grammar = bench.free(name)
    state = bench.begun(grammar)
    output = bench.tokenizer.encode(said + BEGIN[name], add_special=False)
    state.follow(output)
    assert not state.failed
    for _ in range(2000):
        choices = bench.allowed(state)
        if state.ended or bench.eos[0] in choices:
            break
        output.append(rng.choice(choices))
        state.follow(output)
    else:
        raise AssertionError("no end")
    assert not state.failed
    text = bench.tokenizer._backend.decode(output, skip_special_tokens=False)
    content, calls = bench.read(FORMATS[name], text)
    assert content.strip("\n") == said.strip("\n")
    assert calls
    for call in calls:
        assert_valid(call)
    again = bench.begun(grammar)
    again.follow(output)
    assert bench.allowed(again) == bench.allowed(state)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=50)
@given(
    text=st.lists(
        st.sampled_from([*'<tol_ca>[TO]{"na:e} \n\u00e9\U0001f642', "<think>", "<tool_", "[TOOL_", '{"']), max_size=30
    ).map("".join)
)
def test_text_that_begins_no_call_is_free(bench: Bench, name: str, text: str) -> None:
    if any(mark in text for mark in BEGIN.values()) or '"name"' in text:
        return
    for several in (True, False):
        assert bench.takes(bench.free(name, several=several), text)


CALL = '{"name": "weather", "arguments": {"city": "Oslo", "unit": "c"}}'
NOW = '{"name": "now", "arguments": {}}'
TAKEN = {
    "hermes": [
        f"<tool_call>\n{CALL}\n</tool_call>",
        f"<tool_call>{CALL}</tool_call>",
        f"I look.\n<tool_call>\n{CALL}\n</tool_call> and <think>\n<tool_call>\n{NOW}\n</tool_call>\nDone.",
    ],
    "mistral": [f"[TOOL_CALLS][{CALL}]", f"Well. [TOOL_CALLS] [{CALL}, {NOW}]"],
    "mistral_named": [
        '[TOOL_CALLS]weather[ARGS]{"city": "", "unit": "f"}',
        "x[TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]now[ARGS]{}",
    ],
    "llama3": [
        CALL.replace("arguments", "parameters"),
        '\n{ "type": "function", "name": "now", "parameters": {}}',
        '<|python_tag|>{"name": "now", "parameters": {}}; {"name": "now", "parameters": {}}',
        '{"no": "call"}',
    ],
}
REFUSED = {
    "hermes": [
        "<tool_call>no",
        f"<tool_call>{CALL.replace('weather', 'other')}</tool_call>",
        f"<tool_call>{CALL.replace('Oslo', 'Stockholm')}</tool_call>",
        f"<tool_call>{CALL}",
        f"<tool_call>{NOW.replace('{}', '{  }')}</tool_call>",
    ],
    "mistral": [f"[TOOL_CALLS][{CALL}] and more", "[TOOL_CALLS][]"],
    "mistral_named": ["[TOOL_CALLS]other[ARGS]{}", "[TOOL_CALLS]now[ARGS]{} and"],
    "llama3": [f"{CALL}", '{"name": "x"}', '{"name": "now", "parameters": {}} and'],
}


@pytest.mark.parametrize("name", FORMATS)
def test_calls_that_are_taken_and_refused(bench: Bench, name: str) -> None:
    grammar, single = bench.free(name), bench.free(name, several=False)
    for text in TAKEN[name]:
        assert bench.takes(grammar, text), text
        several = len(bench.read(FORMATS[name], text)[1]) > 1
        assert bench.takes(single, text) is not several, text
    for text in REFUSED[name]:
        assert not bench.takes(grammar, text), text


def test_function_without_a_schema_takes_any_object(bench: Bench) -> None:
    grammar = bench.free("hermes", callees=[Callee("any"), CALLEES[0]])
    assert bench.takes(grammar, '<tool_call>{"name": "any", "arguments": {"x": [1, {"y": null}]}}</tool_call>')
    assert not bench.takes(grammar, '<tool_call>{"name": "any", "arguments": 3}</tool_call>')


@pytest.mark.parametrize("name", ["hermes", "mistral", "mistral_named"])
def test_json_or_calls(bench: Bench, name: str) -> None:
    grammar = calls_or_json(FORMATS[name], CALLEES, bench.tokenizer, json.dumps(SCHEMA), several=True)
    assert bench.takes(grammar, '{"city": "Oslo", "unit": "c"}')
    assert not bench.takes(grammar, '{"city": "Oslo"}')
    assert not bench.takes(grammar, "Some text")
    for text in TAKEN[name]:
        alone = not bench.read(FORMATS[name], text)[0]
        assert bench.takes(grammar, text) is alone, text


@pytest.mark.parametrize("name", FORMATS)
def test_forced_calls_are_the_whole_answer(bench: Bench, name: str) -> None:
    grammar = forced_calls(FORMATS[name], CALLEES, bench.tokenizer, several=False)
    forced = {
        "hermes": f"<tool_call>\n{CALL}\n</tool_call>",
        "mistral": f"[TOOL_CALLS][{CALL}]",
        "mistral_named": '[TOOL_CALLS]weather[ARGS]{"city": "Oslo", "unit": "c"}',
        "llama3": CALL.replace("arguments", "parameters"),
    }[name]
    assert bench.takes(grammar, forced)
    assert not bench.takes(grammar, "No.")
    assert not bench.takes(grammar, forced.replace("Oslo", "Stockholm"))
    assert not bench.takes(grammar, forced.replace('"unit": ', '"unit":  '))
