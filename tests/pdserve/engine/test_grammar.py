"""A grammar's state is a function of the output: following it in any steps gives the same masks and the same end."""

from __future__ import annotations

import json
import re
from concurrent.futures import Future
from pathlib import Path

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdserve.engine.grammar import TokenGrammar
from pdserve.errors import InvalidRequest
from pdserve.grammars import Grammars
from pdserve.request import Grammar

EOS = 2
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


@pytest.fixture(scope="module")
def grammars(default_model: Path) -> Grammars:
    return Grammars(default_model / "tokenizer.json", 49152, [EOS])


@pytest.fixture(scope="module")
def tokenizer(default_model: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(default_model / "tokenizer.json"))


def allowed(grammar: TokenGrammar) -> set[int]:
    mask = grammar.allowed()
    return set(range(49152)) if mask is None else {token for token, may in enumerate(mask) if may}


def drawn(grammar: TokenGrammar, data: st.DataObject, tokenizer: tokenizers.Tokenizer, most: int) -> list[int]:
    """An output that the grammar allows, to its end or to `most` tokens."""
    output: list[int] = []
    while not grammar.ended and len(output) < most:
        choices = sorted(allowed(grammar) - {EOS})
        if not choices:
            break
        output.append(choices[data.draw(st.integers(0, 10**6)) % len(choices)])
        grammar.follow(output)
    assert not grammar.failed
    return output


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_rebuilt_state_is_the_state(grammars: Grammars, tokenizer: tokenizers.Tokenizer, data: st.DataObject) -> None:
    asked = data.draw(
        st.sampled_from((Grammar("regex", "[a-f]{2,9}(x|yz)"), Grammar("json_schema", json.dumps(SCHEMA))))
    )
    grammar = TokenGrammar(grammars.submit(asked))
    output = drawn(grammar, data, tokenizer, most=8)
    cut = data.draw(st.integers(0, len(output)))
    rebuilt = TokenGrammar(grammars.submit(asked))
    rebuilt.follow(output[:cut])
    rebuilt.follow(output)
    assert (rebuilt.ended, rebuilt.failed) == (grammar.ended, False)
    if not grammar.ended:
        assert allowed(rebuilt) == allowed(grammar)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_ended_text_is_what_the_grammar_says(
    grammars: Grammars, tokenizer: tokenizers.Tokenizer, data: st.DataObject
) -> None:
    for asked, pattern in (
        (Grammar("regex", "[a-f]{2,9}(x|yz)"), "[a-f]{2,9}(x|yz)"),
        (Grammar("lark", 'start: "yes" | "no" | "may be"'), "yes|no|may be"),
    ):
        grammar = TokenGrammar(grammars.submit(asked))
        output = drawn(grammar, data, tokenizer, most=40)
        assert grammar.ended
        assert re.fullmatch(pattern, tokenizer.decode(output))


def test_token_that_is_not_allowed_fails_it(grammars: Grammars, tokenizer: tokenizers.Tokenizer) -> None:
    grammar = TokenGrammar(grammars.submit(Grammar("regex", "[a-f]+")))
    grammar.follow(tokenizer.encode("zzz").ids)
    assert grammar.failed
    assert not grammar.ended
    assert len(allowed(grammar)) == 49152  # the sequence ends with an error; its row must not hurt the batch


@pytest.mark.parametrize(
    "asked",
    [
        Grammar("regex", "(((("),
        Grammar("lark", "start: missing"),
        Grammar("json_schema", '{"type": "nonsense"}'),
        Grammar("json_schema", "no JSON"),
    ],
)
def test_grammar_that_cannot_be_used_is_an_error(grammars: Grammars, asked: Grammar) -> None:
    with pytest.raises(InvalidRequest):
        grammars.compile(asked)
    grammar = TokenGrammar(grammars.submit(asked))
    grammar.follow([1])
    assert grammar.failed


def test_grammar_that_never_compiles_fails_its_sequence_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdserve.engine.grammar._COMPILE_S", 0.01)
    grammar = TokenGrammar(Future())
    grammar.follow([1])
    assert grammar.failed
