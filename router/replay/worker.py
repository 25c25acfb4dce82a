"""A worker as a replay needs it: a least-recently-used cache of blocks, prompts one by one, decode beside them.

A prompt waits for those before it and takes its uncached tokens at the worker's rate. Decoding takes a step a token, of
the length that the batch has when it begins, and stands still while the worker computes prompts: both share one engine.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvstore.keys import BlockKey
from router.policy import Speed


@dataclass(frozen=True, slots=True)
class Touched:
    """Of one prompt: leading blocks that were there, those that are new, and those that had to go."""

    hit_blocks: int
    stored: list[BlockKey]
    removed: list[BlockKey]


@dataclass(slots=True)
class ReplayWorker:
    """Times are seconds of the virtual clock."""

    capacity_blocks: int
    speed: Speed
    blocks: OrderedDict[BlockKey, None] = field(default_factory=OrderedDict)  # least recently used first
    idle_from_s: float = 0.0  # when it has computed every prompt that it was sent
    prompts_s: float = 0.0  # of computing prompts, all that it was ever sent
    decoding: int = 0
    life: int = 0  # rises when it dies, so that what it was doing comes to nothing

    def touch(self, keys: Sequence[BlockKey]) -> Touched:
        blocks = self.blocks
        hit_blocks = next((at for at, key in enumerate(keys) if key not in blocks), len(keys))
        stored = [key for key in keys[hit_blocks:] if key not in blocks]
        for key in reversed(keys):  # a prefix is used after its descendants, so that it is evicted after them
            blocks[key] = None
            blocks.move_to_end(key)
        removed = [blocks.popitem(last=False)[0] for _ in range(len(blocks) - self.capacity_blocks)]
        return Touched(hit_blocks, stored, removed)

    def enqueue(self, uncached_tokens: int, now_s: float) -> float:
        """When the prompt will be computed."""
        compute_s = self.speed.prefill_s(uncached_tokens)
        self.prompts_s += compute_s
        self.idle_from_s = max(self.idle_from_s, now_s) + compute_s
        return self.idle_from_s

    def computed_s(self, now_s: float) -> float:
        """How long it has computed prompts until `now_s`."""
        return self.prompts_s - max(0.0, self.idle_from_s - now_s)

    def die(self, now_s: float) -> None:
        self.blocks.clear()
        self.prompts_s = self.computed_s(now_s)
        self.idle_from_s = now_s
        self.decoding = 0
        self.life += 1
