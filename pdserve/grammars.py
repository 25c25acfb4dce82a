"""Structured output: grammars compiled for a model's tokens, by llguidance.

On a worker that happens beside the prefill, on a thread of its own, within limits on size and on the work of each step;
`router.grammar_check` does it first in a process that can be killed, and refuses what is too much.
"""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from pdserve.errors import InvalidRequest
from pdserve.request import Grammar

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

_CACHED = 64  # compiled grammars kept; a copy of one costs microseconds
# JSON without free whitespace: a small model could go on with blanks for ever.
_JSON: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammars:
    """Compiles for one model. Any thread."""

    def __init__(self, tokenizer: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """`tokenizer`: a tokenizer.json; it is read with the first grammar."""
        self._tokenizer_path = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, "grammar")

    def submit(self, grammar: Grammar) -> Future[LLMatcher]:
        """`compile` on the thread for it; returns at once."""
        return self._thread.submit(self.compile, grammar)

    def compile(self, grammar: Grammar) -> LLMatcher:
        """Raises InvalidRequest: the grammar has an error, or is too large."""
        if self._tokenizer is None:
            self._tokenizer = LLTokenizer(
                str(self._tokenizer_path), n_vocab=self._vocab_size, eos_token=self._eos_token_ids
            )
        matcher = self._compiled.pop(grammar, None)
        if matcher is None:
            matcher = LLMatcher(self._tokenizer, _source(grammar), limits=LLParserLimits(), log_level=0)
            if matcher.is_error():
                raise InvalidRequest(f"The grammar cannot be used: {_first_line(matcher.get_error())}")
        self._compiled[grammar] = matcher
        if len(self._compiled) > _CACHED:
            self._compiled.popitem(last=False)
        return matcher.deep_copy()


def _source(grammar: Grammar) -> str:
    """As llguidance wants it. Raises InvalidRequest."""
    match grammar.kind:
        case "json_schema":
            try:
                return LLMatcher.grammar_from_json_schema(grammar.source, overrides=_JSON)
            except ValueError as error:
                raise InvalidRequest(f"The JSON schema cannot be used: {_first_line(str(error))}") from error
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.source)
        case "lark":
            return LLMatcher.grammar_from_lark(grammar.source)


def _first_line(message: str) -> str:
    return " ".join(message.split())[:300]


def check_lines() -> None:
    """For a process that can be killed. Its arguments are those of `Grammars`; each line that it reads is a JSON object
    with a grammar's `kind` and `source`, and is answered with a line: what is wrong with it, as a JSON string, or
    null."""
    tokenizer, vocab_size, *eos_token_ids = sys.argv[1:]
    grammars = Grammars(Path(tokenizer), int(vocab_size), [int(token_id) for token_id in eos_token_ids])
    for line in sys.stdin:
        try:
            # The first mask is the dearest: the lexer's automata are built for it.
            grammars.compile(Grammar(**json.loads(line))).compute_bitmask()
            answer = None
        except InvalidRequest as error:
            answer = error.message
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    check_lines()
