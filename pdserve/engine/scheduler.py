"""What the next step computes. Pure: works on sequences and the pool, imports no torch, asks no clock.

A step has a token budget. Running sequences that decode come first (one token each), then prompts that are partly
computed, then waiting ones in order of arrival; the last prompt to fit is cut to what is left of the budget (a chunk).
A decode that finds no block preempts the youngest sequence, which starts over later from whatever is still cached.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import islice

from kvstore.errors import NoRoom
from kvstore.keys import BlockKey
from kvstore.pool import BlockPool, BlockRef, HoldKind
from pdserve.engine.config import EngineConfig
from pdserve.engine.sequence import Sequence, Status


@dataclass(frozen=True, slots=True)
class Chunk:
    """Compute `num_tokens` tokens of the sequence, from `sequence.num_computed` on, and behind them a `draft`."""

    sequence: Sequence
    num_tokens: int
    draft: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int:
        return self.num_tokens + len(self.draft)

    @property
    def last(self) -> bool:
        """After it every token has its KV, and the next one is sampled."""
        return self.num_tokens == self.sequence.num_uncomputed

    def completes(self, index: int, key: BlockKey) -> bool:
        """It ends the computing of the block `key`, which is the one at `index` of its chain."""
        sequence, block_size = self.sequence, self.sequence.block_size
        begin, end = sequence.num_computed, sequence.num_computed + self.num_tokens
        return begin < (index + 1) * block_size <= end and sequence.full_block_keys()[index] == key


@dataclass(frozen=True, slots=True)
class Committed:
    """A block that became visible here: the one at `index` of its chain of keys."""

    root: BlockKey
    chain: Seq[BlockKey]  # of the sequence's full blocks, the later ones too
    index: int
    tenant: str = ""

    @property
    def key(self) -> BlockKey:
        return self.chain[self.index]

    @property
    def parent(self) -> BlockKey:
        """The key before it, the root key for the first."""
        return self.chain[self.index - 1] if self.index else self.root


@dataclass(frozen=True, slots=True)
class Plan:
    chunks: tuple[Chunk, ...]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)


class Scheduler:
    """Owns the queues; the pool owns the blocks, under the sequence's name."""

    def __init__(self, config: EngineConfig, pool: BlockPool) -> None:
        self._config = config
        self._pool = pool
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self.arriving: dict[str, Sequence] = {}
        self.num_preempted = 0
        self._committed: list[Committed] = []  # since the last drain

    # --- coming and going --------------------------------------------------------------------------------------------

    @property
    def full(self) -> bool:
        return len(self.waiting) >= self._config.max_waiting

    def add(self, sequence: Sequence) -> None:
        sequence.status = Status.WAITING
        self.waiting.append(sequence)

    def reserve(self, sequence: Sequence, now_s: float, deadline_s: float) -> int:
        """Take the blocks that an arriving sequence needs: cached ones first, the rest to be received.

        Returns the number of leading blocks already here. Raises NoRoom when the sequence, or what those before it
        still need, does not fit now; nothing is taken then.
        """
        pool = self._pool
        # The first in the queue comes before it, or a stream of reservations could starve what was preempted.
        others = [*self.running, *self.arriving.values(), *islice(self.waiting, 1)]
        if len(others) >= self._config.max_sequences:
            raise NoRoom(f"{self._config.max_sequences} sequences are running")
        pool.open(sequence.name, HoldKind.RECEIVE, now_s, deadline_s)
        sequence.add_blocks(pool.acquire(sequence.name, sequence.full_block_keys()))
        held = len(sequence.blocks)
        missing = sequence.num_missing_blocks
        # The rest of their prompts, and a block for everybody to decode on.
        owed = sum(other.num_missing_blocks + 1 for other in others) + 1
        if others and pool.num_available < missing + owed:
            self._take_back(sequence)
            raise NoRoom(f"{missing} blocks wanted beside the {owed} that others need, {pool.num_available} available")
        try:
            sequence.add_blocks(pool.allocate(sequence.name, missing))
        except NoRoom:
            self._take_back(sequence)
            raise
        sequence.status = Status.ARRIVING
        sequence.num_committed = held
        self.arriving[sequence.name] = sequence
        return held

    def arrived(self, sequence: Sequence, token_ids: Iterable[int]) -> None:
        """All blocks of an arriving sequence are verified; it goes on with the tokens sampled elsewhere."""
        del self.arriving[sequence.name]
        self._pool.keep(sequence.name)
        sequence.num_computed = len(sequence)
        self._commit_full_blocks(sequence)
        sequence.token_ids.extend(token_ids)
        sequence.status = Status.RUNNING
        self.running.append(sequence)

    def hand_off(self, sequence: Sequence, deadline_s: float) -> None:
        """Its prompt is computed: out of the queues, while its blocks stay held for the push until `finish`."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        sequence.status = Status.HANDING_OFF
        self._pool.lend(sequence.name, deadline_s)

    def finish(self, sequence: Sequence) -> list[BlockRef]:
        """Take the sequence out, whatever it was doing, and give its blocks back; returns those now in quarantine."""
        if sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        elif sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is Status.ARRIVING:
            self.arriving.pop(sequence.name, None)
        sequence.status = Status.FINISHED
        return self._pool.release(sequence.name)

    @property
    def busy(self) -> bool:
        return bool(self.running or self.arriving)

    # --- one step ----------------------------------------------------------------------------------------------------

    def schedule(self, now_s: float) -> Plan:
        """Choose the chunks of the next step and take the blocks they write to."""
        chunks: list[Chunk] = []
        budget = self._config.max_batched_tokens
        # A preemption hits younger ones only, so never one that has its chunk already.
        for sequence in list(self.running):
            if sequence.decoding and sequence.status is Status.RUNNING and self._grow(sequence, 1):
                draft = self._draft(sequence, budget - len(self.running))
                chunks.append(Chunk(sequence, 1, draft))
                budget -= 1 + len(draft)
        for sequence in list(self.running):
            if budget > 0 and sequence.status is Status.RUNNING and not sequence.decoding:
                budget -= self._add_chunk(chunks, sequence, budget)
        while budget > 0 and self.waiting and len(self.running) + len(self.arriving) < self._config.max_sequences:
            sequence = self.waiting[0]
            if self._computes_for(sequence, chunks) or not self._admit(sequence, now_s):
                break
            taken = self._add_chunk(chunks, sequence, budget)
            budget -= taken
            if taken == 0:
                break
        for chunk in chunks:
            if chunk.sequence.scheduled_s is None:
                chunk.sequence.scheduled_s = now_s
        return Plan(tuple(chunks))

    def look_ahead(self, plan: Plan, ended: Seq[Sequence] = ()) -> Plan | None:
        """The step after `plan` while that is being computed: one more token for each of its sequences that have not
        `ended`, as if none did but those that certainly do; takes the blocks for it.

        None where the step depends on more than that: a prompt to go on with, one that could be admitted, a draft to
        check, blocks that are short.
        """
        config = self._config
        admits = self.waiting and len(self.running) + len(self.arriving) < config.max_sequences
        going_on = all(c.last and c.num_rows == 1 and not c.sequence.prefill_only for c in plan.chunks)
        if admits or not going_on or len(plan.chunks) != len(self.running) or config.speculate_tokens:
            return None
        sequences = [
            chunk.sequence
            for chunk in plan.chunks
            if chunk.sequence not in ended
            and chunk.sequence.num_output_tokens + 1 < chunk.sequence.sampling.max_tokens
            and len(chunk.sequence) + 1 < config.max_model_len
        ]
        full = [s for s in sequences if s.num_computed + 2 > len(s.blocks) * config.block_size]
        if not sequences or len(full) > self._pool.num_available:
            return None
        for sequence in full:
            sequence.add_blocks(self._pool.allocate(sequence.name, 1))
        return Plan(tuple(Chunk(sequence, 1) for sequence in sequences))

    def commit(self, plan: Plan) -> None:
        """The chunks are computed: advance, and make full blocks visible."""
        for chunk in plan.chunks:
            chunk.sequence.num_computed += chunk.num_tokens
            self._commit_full_blocks(chunk.sequence)

    def accept(self, sequence: Sequence, num_tokens: int) -> None:
        """Tokens of a draft turned out right, and are the sequence's now: their KV is there."""
        sequence.num_computed += num_tokens
        self._commit_full_blocks(sequence)

    def drain_committed(self) -> tuple[Committed, ...]:
        """Blocks of sequences that became full since the last drain, parents first."""
        committed = tuple(self._committed)
        self._committed.clear()
        return committed

    # --- inside ------------------------------------------------------------------------------------------------------

    def _add_chunk(self, chunks: list[Chunk], sequence: Sequence, budget: int) -> int:
        """Add as much of the sequence as budget and room allow; returns the tokens taken."""
        # Others that run need room to decode on: a prompt may not take the last blocks from them.
        spare = self._pool.num_available - sum(1 for other in self.running if other.decoding and other is not sequence)
        room = (len(sequence.blocks) + max(spare, 0)) * self._config.block_size - sequence.num_computed
        num_tokens = min(sequence.num_uncomputed, budget, room)
        if num_tokens <= 0 or not self._grow(sequence, num_tokens):
            return 0
        chunks.append(Chunk(sequence, num_tokens))
        return num_tokens

    def _usable_keys(self, sequence: Sequence) -> list[BlockKey]:
        """Of the blocks that it need not compute if they are here."""
        if sequence.tells_prompt_logprobs:
            return []
        # The last token is always computed: its logits are what the next one is sampled from.
        return sequence.full_block_keys()[: (len(sequence) - 1) // self._config.block_size]

    def _computes_for(self, sequence: Sequence, chunks: Iterable[Chunk]) -> bool:
        """Whether the next block that it lacks is one of a chunk's: after the step it is there, so that the samples of
        a prompt, or requests that begin alike, compute it once."""
        prompts = [chunk for chunk in chunks if not chunk.sequence.decoding]
        if not prompts:
            return False
        keys = self._usable_keys(sequence)
        held = self._pool.match(keys)
        return held < len(keys) and any(chunk.completes(held, keys[held]) for chunk in prompts)

    def _admit(self, sequence: Sequence, now_s: float) -> bool:
        """Move a waiting sequence to running, with the prefix it finds; False if there is no room for a first chunk."""
        self._pool.open(sequence.name, HoldKind.COMPUTE, now_s)
        sequence.add_blocks(self._pool.acquire(sequence.name, self._usable_keys(sequence)))
        if self._pool.num_available < 1 + len(self.running) and self.busy:
            self._take_back(sequence)
            return False
        sequence.num_computed = len(sequence.blocks) * self._config.block_size
        sequence.num_committed = len(sequence.blocks)
        if sequence.scheduled_s is None:
            sequence.cached_tokens = min(sequence.num_computed, sequence.num_prompt_tokens)
        self.waiting.popleft()
        sequence.status = Status.RUNNING
        self.running.append(sequence)
        return True

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give the sequence blocks for `num_tokens` more tokens, at the cost of younger ones."""
        needed = -(-(sequence.num_computed + num_tokens) // self._config.block_size) - len(sequence.blocks)
        while needed > self._pool.num_available:
            victim = self.running[-1]
            if victim is sequence:
                if len(self.running) > 1:
                    self._preempt(sequence)
                return False
            self._preempt(victim)
        if needed > 0:
            sequence.add_blocks(self._pool.allocate(sequence.name, needed))
        return True

    def _draft(self, sequence: Sequence, budget: int) -> tuple[int, ...]:
        """Within the step's budget, the context, and blocks that are free: nobody is preempted for it."""
        if not self._config.speculate_tokens or budget <= 0:
            return ()
        spare = self._pool.num_available - len(self.running)
        room = (len(sequence.blocks) + max(spare, 0)) * self._config.block_size - len(sequence)
        draft = sequence.draft(self._config.speculate_tokens)
        draft = draft[: max(0, min(budget, room, self._config.max_model_len - len(sequence) - 1))]
        return tuple(draft) if draft and self._grow(sequence, 1 + len(draft)) else ()

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._take_back(sequence)
        sequence.status = Status.WAITING
        self.waiting.appendleft(sequence)
        self.num_preempted += 1

    def _take_back(self, sequence: Sequence) -> None:
        self._pool.release(sequence.name)
        sequence.drop_blocks()

    def _commit_full_blocks(self, sequence: Sequence) -> None:
        full = sequence.num_computed // self._config.block_size
        if full > sequence.num_committed:
            keys = sequence.full_block_keys()
            for i in range(sequence.num_committed, full):
                ref = self._pool.commit(sequence.name, sequence.blocks[i], keys[i])
                if ref == sequence.blocks[i]:  # else another sequence was first
                    self._committed.append(Committed(sequence.root_key, keys, i, sequence.tenant))
                sequence.replace_block(i, ref)
            sequence.num_committed = full
