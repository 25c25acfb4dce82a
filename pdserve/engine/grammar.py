"""Which tokens may come next, so that the output's text is what a grammar says.

The state is a function of the output tokens alone: whoever continues a request rebuilds it from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

from llguidance import LLMatcher

from pdserve.errors import InvalidRequest

_COMPILE_S = 10.0  # a step waits this long at most for a grammar that is not compiled yet


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

    def allowed(self) -> bytes | None:
        """One byte a token of the vocabulary, 0 where it may not come next; None: all may."""
        matcher = self._matcher()
        return None if matcher is None else matcher.compute_logit_bias()

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
