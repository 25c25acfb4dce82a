"""How often each token stands in one sequence, for the penalties of sampling."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class TokenCounts:
    """Follows a growing sequence: one look-up a token, and arrays that are ready for indexing."""

    def __init__(self, prompt: Sequence[int]) -> None:
        ids = np.unique(np.asarray(prompt, np.int64))
        self._slots = {int(token_id): slot for slot, token_id in enumerate(ids)}
        self._ids = ids
        self._outputs = np.zeros(len(ids), np.float32)
        self.num_outputs = 0

    def follow(self, output: Sequence[int]) -> None:
        """Count the output tokens that are new; `output` is all of them so far."""
        for token_id in output[self.num_outputs :]:
            slot = self._slots.setdefault(token_id, len(self._slots))
            if slot == len(self._ids):
                # Doubled, so that growing costs a constant amount a token.
                self._ids = np.concatenate((self._ids, np.zeros(max(16, slot), np.int64)))
                self._outputs = np.concatenate((self._outputs, np.zeros(max(16, slot), np.float32)))
            self._ids[slot] = token_id
            self._outputs[slot] += 1
        self.num_outputs = len(output)

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """[D]: the distinct tokens of prompt and output."""
        return self._ids[: len(self._slots)]

    @property
    def in_output(self) -> NDArray[np.float32]:
        """[D]: how often each of `token_ids` stands in the output; 0 for those of the prompt alone."""
        return self._outputs[: len(self._slots)]
