"""A grammar without a language: what may come next, and whether the text is complete, is a hash of the output."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

from tests.support.oracle_model import VOCAB_SIZE


class HashGrammar:
    """Implements `pdserve.engine.sequence.Grammar`. One state in 16 is complete; in one in 32 nothing may come, so that
    whatever does come is wrong."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.failed = False
        self._output: list[int] = []

    def again(self) -> HashGrammar:
        """One that has seen nothing."""
        return HashGrammar(self.seed)

    def follow(self, output: Sequence[int]) -> None:
        assert list(output[: len(self._output)]) == self._output, "what was followed is not taken back"
        for token in output[len(self._output) :]:
            self.failed = self.failed or not self.allowed()[token]
            self._output.append(token)

    def allowed(self) -> bytes:
        state = self._state()
        if state[0] % 32 == 1:
            return bytes(VOCAB_SIZE)
        return bytes(
            state[token % len(state)] % 3 == 0 or token == state[1] % VOCAB_SIZE for token in range(VOCAB_SIZE)
        )

    @property
    def ended(self) -> bool:
        return bool(self._output) and self._state()[0] % 16 == 2

    def _state(self) -> bytes:
        return blake2b(bytes(self._output), key=bytes([self.seed]), digest_size=64).digest()
