"""Structured output: which tokens may come next, so that the text is what a grammar says. Over llguidance.

A grammar is compiled beside the prefill, on a thread of its own, within limits on its size and on the work of every
step; `router.grammar_check` compiles it first in a process that can be killed, and refuses what is too much. The state
is a function of the output tokens alone: whoever continues a request rebuilds it from them.
"""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from torch import Tensor

from pdserve.errors import InvalidRequest
from pdserve.request import Grammar

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

_CACHED = 64  # compiled grammars kept; a copy of one costs microseconds
_COMPILE_S = 10.0  # a step waits this long at most for a grammar that is not compiled yet
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

    def start(self, grammar: Grammar) -> TokenGrammar:
        """Returns at once."""
        return TokenGrammar(self._thread.submit(self.compile, grammar))

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


class TokenGrammar:
    """The state of one output; use from one thread."""

    def __init__(self, compiled: Future[LLMatcher]) -> None:
        self._compiled = compiled
        self._num_followed = 0
        self.failed = False  # it could not be compiled, or met a token that it does not allow

    def follow(self, output: Sequence[int]) -> None:
        """`output`: all output tokens so far."""
        matcher = self._matcher()
        if matcher is not None:
            for token_id in output[self._num_followed :]:
                self.failed = self.failed or not matcher.consume_token(token_id)
        self._num_followed = len(output)

    def apply(self, logits: Tensor) -> None:
        """logits [vocab], in place: those of tokens that may not come become -inf."""
        matcher = self._matcher()
        if matcher is not None:
            allowed = torch.frombuffer(bytearray(matcher.compute_logit_bias()), dtype=torch.uint8)
            logits.masked_fill_(allowed == 0, float("-inf"))

    @property
    def ended(self) -> bool:
        """The text is complete, and nothing may follow."""
        matcher = self._matcher()
        return matcher is not None and matcher.is_stopped()

    def _matcher(self) -> LLMatcher | None:
        if self.failed:
            return None
        try:
            return self._compiled.result(_COMPILE_S)
        except (InvalidRequest, TimeoutError):
            self.failed = True
            return None


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
