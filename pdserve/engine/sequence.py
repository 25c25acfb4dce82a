"""A sequence: the engine's state of one request."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from kvstore.keys import GROUP_BLOCKS, BlockKey, block_keys
from kvstore.pool import BlockRef
from pdserve.engine.prompt_lookup import PromptLookup
from pdserve.engine.token_counts import TokenCounts
from pdserve.request import FinishReason, SamplingParams, TokenLogprobs


class Status(Enum):
    """
    NEW ── add ──> WAITING ── admit ──> RUNNING ── last token ──────────────────────────> FINISHED
     │                ^                  │ ^ └─── prefill_only: its token ──> HANDING_OFF ──> FINISHED
     │                └──── preempt ─────┘ │          abort, from anywhere ─────────────> FINISHED
     └── reserve ──> ARRIVING ── committed ┘
                     (its blocks land from a prefill worker)
    """

    NEW = "new"
    WAITING = "waiting"
    RUNNING = "running"
    ARRIVING = "arriving"
    HANDING_OFF = "handing off"
    FINISHED = "finished"


class Grammar(Protocol):
    """What the output must be; a function of the output tokens. `pdserve.engine.grammar` has the real one."""

    @property
    def ended(self) -> bool: ...

    @property
    def failed(self) -> bool: ...

    def follow(self, output: Seq[int]) -> None: ...

    def allowed(self) -> bytes | None: ...


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens so far, and how many of them have their KV in the pool.

    Position:  0 ........ num_computed ........ len(token_ids)
               KV in `blocks`    to compute
    """

    name: str  # request id and attempt: the owner of its blocks
    token_ids: array[int]  # prompt and output
    num_prompt_tokens: int
    sampling: SamplingParams
    root_key: BlockKey
    block_size: int
    arrived_s: float
    tenant: str = ""  # whose quota in the store its blocks count against
    prefill_only: bool = False  # ends after the next token, whose KV another worker will compute
    status: Status = Status.NEW
    num_computed: int = 0
    cached_tokens: int = 0  # prompt tokens found in the pool at the first admission
    scheduled_s: float | None = None  # first time in a step
    blocks: list[BlockRef] = field(default_factory=list)
    block_ids: array[int] = field(default_factory=lambda: array("i"))
    keys: list[BlockKey] = field(default_factory=list)  # of the leading full blocks of token_ids
    num_committed: int = 0  # leading blocks that were offered to the prefix cache
    grammar: Grammar | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the computed prompt's second token on
    _counts: TokenCounts | None = None
    lookup: PromptLookup | None = None

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def decoding(self) -> bool:
        """Only the newest token is left to compute."""
        return self.num_uncomputed == 1 and self.num_output_tokens > 0

    @property
    def output(self) -> array[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def tells_prompt_logprobs(self) -> bool:
        """Its prompt is computed whole, since logits of cached tokens are not there; once, before the first token."""
        return self.sampling.prompt_logprobs is not None and not self.num_output_tokens

    def counts(self) -> TokenCounts | None:
        """Of its tokens so far, if its sampling penalises."""
        if not self.sampling.penalises:
            return None
        if self._counts is None:
            self._counts = TokenCounts(self.token_ids[: self.num_prompt_tokens])
        self._counts.follow(self.output)
        return self._counts

    def draft(self, max_tokens: int) -> list[int]:
        """Tokens that may come next. None for a sequence whose sampling depends on the token before."""
        if self.sampling.penalises or self.grammar is not None:
            return []
        if self.lookup is None:
            self.lookup = PromptLookup(max_tokens)
        room = self.sampling.max_tokens - self.num_output_tokens - 1
        return self.lookup.draft(self.token_ids)[: max(0, room)]

    def full_block_keys(self) -> list[BlockKey]:
        """Keys of all full blocks of the tokens so far; extends those already derived."""
        done = len(self.keys)
        if (len(self.token_ids) // self.block_size) > done:
            begun = done - done % GROUP_BLOCKS  # the chain goes on where its group began
            parent = self.keys[begun - 1] if begun else self.root_key
            self.keys[begun:] = block_keys(parent, self.token_ids[begun * self.block_size :], self.block_size)
        return self.keys

    def add_blocks(self, refs: list[BlockRef]) -> None:
        self.blocks.extend(refs)
        self.block_ids.extend(ref.block_id for ref in refs)

    def replace_block(self, index: int, ref: BlockRef) -> None:
        self.blocks[index] = ref
        self.block_ids[index] = ref.block_id

    @property
    def num_missing_blocks(self) -> int:
        """Blocks that the tokens so far need beside those it has."""
        return -(-len(self.token_ids) // self.block_size) - len(self.blocks)

    def drop_blocks(self) -> None:
        """Forget the KV: the pool has taken the blocks back."""
        self.blocks.clear()
        del self.block_ids[:]
        self.num_computed = self.num_committed = 0

    def finish_reason(self, max_model_len: int) -> FinishReason | None:
        """Whether the newest output token ended the sequence, and why."""
        if self.num_output_tokens >= self.sampling.min_tokens and self.token_ids[-1] in self.sampling.stop_token_ids:
            return FinishReason.STOP
        if self.grammar is not None:
            self.grammar.follow(self.output)
            if self.grammar.failed:
                return FinishReason.ERROR
            if self.grammar.ended:
                return FinishReason.STOP
        if self.num_output_tokens >= self.sampling.max_tokens or len(self.token_ids) >= max_model_len:
            return FinishReason.LENGTH
        return None
