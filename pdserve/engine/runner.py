"""Turns a plan into tensors, runs the model, and gives back one sampled token per finished chunk.

A step is `launch` then `collect`; between the two the next one may be launched where the device works by itself
(pdserve.engine.device_runner). On the CPU a launch is the whole work.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pdserve.engine.sampler import Sampled, Sampler, SamplingRow
from pdserve.engine.scheduler import Chunk, Plan
from pdserve.kernels.base import Batch

_DESCRIBED_ROWS = 64  # logits of a prompt at a time: a row has 4 bytes for each token of the vocabulary


class Model(Protocol):
    """What the runner needs of a model; `pdserve.models.decoder` has the real one."""

    def forward(self, token_ids: Tensor, batch: Batch, pool: Tensor) -> Tensor:
        """token_ids [T] -> hidden states [T, H]; appends the tokens' KV to the pool."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, H] -> float32 [R, vocab]."""
        ...


@dataclass(frozen=True, slots=True)
class Flight:
    """A launched step."""

    plan: Plan
    sampled: list[list[Sampled]]


class Runner:
    """Owns the KV pool's memory: `pool` is `[num_blocks, kv_heads, layers, 2, block_size, head_dim]`."""

    def __init__(self, model: Model, pool: Tensor, sampler: Sampler) -> None:
        self.model = model
        self.pool = pool
        self.sampler = sampler

    def enter_thread(self) -> None:
        """To be called once on each thread that runs steps, before the first."""

    def foresees(self, plan: Plan) -> bool:
        """Whether the step behind `plan` may be launched while that is under way."""
        return False

    def launch(self, plan: Plan, after: Flight | None = None) -> Flight:
        """Begin to compute the plan's chunks.

        Args:
            after: the step under way whose tokens this one goes on from, where `foresees` allowed it.
        """
        assert after is None
        return Flight(plan, self._run(plan))

    def collect(self, flight: Flight) -> list[list[Sampled]]:
        """The next token of each chunk that is its sequence's last, in order: one more for each token of its draft that
        turned out right."""
        return flight.sampled

    @torch.inference_mode()
    def _run(self, plan: Plan) -> list[list[Sampled]]:
        token_ids, batch = build_batch(plan.chunks)
        hidden = self.model.forward(token_ids, batch, self.pool)
        starts = batch.query_start.tolist()
        self.describe_prompts(plan, starts, hidden)
        ready, last_rows = ready_rows(plan, starts)
        if not last_rows:
            return []
        if len(last_rows) < hidden.shape[0]:
            hidden = hidden[torch.tensor(last_rows)]
        rows = [row for chunk in ready for row in sampling_rows(chunk)]
        return verified(ready, self.sampler.sample(self.model.logits(hidden), rows))

    def describe_prompts(self, plan: Plan, starts: Seq[int], hidden: Tensor) -> None:
        """For the sequences that asked for it; `starts` are the first rows of the chunks in hidden [T, H]."""
        for chunk, start in zip(plan.chunks, starts, strict=False):
            if chunk.sequence.tells_prompt_logprobs:
                self._describe_prompt(chunk, hidden[start : start + chunk.num_tokens])

    def _describe_prompt(self, chunk: Chunk, hidden: Tensor) -> None:
        """hidden [num_tokens, H]; the row of a token tells of the one behind it, as far as that is the prompt's."""
        sequence, start = chunk.sequence, chunk.sequence.num_computed
        assert sequence.sampling.prompt_logprobs is not None
        behind = sequence.token_ids[start + 1 : min(start + 1 + chunk.num_tokens, sequence.num_prompt_tokens)]
        del sequence.prompt_logprobs[start:]  # of a computation that was given up
        for first in range(0, len(behind), _DESCRIBED_ROWS):
            some = behind[first : first + _DESCRIBED_ROWS]
            logits = self.model.logits(hidden[first : first + len(some)]).cpu()
            sequence.prompt_logprobs += self.sampler.describe(logits, some, sequence.sampling.prompt_logprobs)


def ready_rows(plan: Plan, starts: Seq[int]) -> tuple[list[Chunk], list[int]]:
    """The chunks whose next token is sampled, and the rows that it is sampled from; `starts` as `query_start`."""
    ready = [(chunk, end) for chunk, end in zip(plan.chunks, starts[1:], strict=True) if chunk.last]
    rows = [row for chunk, end in ready for row in range(end - 1 - len(chunk.draft), end)]
    return [chunk for chunk, _ in ready], rows


def sampling_rows(chunk: Chunk, ahead: int = 0) -> list[SamplingRow]:
    """One, and one for each token of the draft, as if that were right; `ahead` tokens are sampled but not known."""
    sequence = chunk.sequence
    if sequence.grammar is not None:
        sequence.grammar.follow(sequence.output)
    counts = sequence.counts()
    return [
        SamplingRow(sequence.sampling, sequence.num_output_tokens + ahead + i, counts, sequence.grammar)
        for i in range(len(chunk.draft) + 1)
    ]


def verified(ready: list[Chunk], sampled: list[Sampled]) -> list[list[Sampled]]:
    """One list a chunk, from one sampled token for each of its rows."""
    rest = iter(sampled)
    return [_right(chunk.draft, [next(rest) for _ in range(len(chunk.draft) + 1)]) for chunk in ready]


def _right(draft: tuple[int, ...], sampled: list[Sampled]) -> list[Sampled]:
    """Up to the first token that is not the draft's: what comes behind was computed from a wrong one. Sampling depends
    on position and logits alone, so this is what a step for each token would have given."""
    right = 0
    while right < len(draft) and sampled[right].token_id == draft[right]:
        right += 1
    return sampled[: right + 1]


def build_batch(chunks: tuple[Chunk, ...], ahead: int = 0) -> tuple[Tensor, Batch]:
    """Tokens of all chunks end to end, int64 [T], and where each of them stands.

    Of chunks launched `ahead` (1) of the step before them the tokens are not known, and left at 0.
    """
    num_tokens = sum(chunk.num_rows for chunk in chunks)
    token_ids = np.empty(num_tokens, np.int64)
    positions = np.empty(num_tokens, np.int32)
    query_start = np.zeros(len(chunks) + 1, np.int32)
    context_len = np.empty(len(chunks), np.int32)
    block_tables = np.zeros((len(chunks), max(len(chunk.sequence.block_ids) for chunk in chunks)), np.int32)
    row = 0
    for i, chunk in enumerate(chunks):
        start = chunk.sequence.num_computed + ahead
        end = start + chunk.num_rows
        known = 0 if ahead else chunk.sequence.token_ids[start : start + chunk.num_tokens]
        token_ids[row : row + chunk.num_tokens] = known
        token_ids[row + chunk.num_tokens : row + chunk.num_rows] = chunk.draft
        positions[row : row + chunk.num_rows] = np.arange(start, end, dtype=np.int32)
        row += chunk.num_rows
        query_start[i + 1] = row
        context_len[i] = end
        block_tables[i, : len(chunk.sequence.block_ids)] = chunk.sequence.block_ids
    batch = Batch(
        positions=torch.from_numpy(positions),
        query_start=torch.from_numpy(query_start),
        context_len=torch.from_numpy(context_len),
        block_tables=torch.from_numpy(block_tables),
        max_query_len=max(chunk.num_rows for chunk in chunks),
    )
    return torch.from_numpy(token_ids), batch
