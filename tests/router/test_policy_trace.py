"""On a public conversation trace the cost policy finds nearly all prefixes and still spreads the work evenly."""

from __future__ import annotations

import gzip
import json
import random
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kvstore.keys import BlockKey
from router.index import PrefixIndex
from router.memory import DecayingSum
from router.policy import POLICIES, Candidate, LoadView, Need, Phase, Role
from router.policy.scorers import RECENT_HALF_LIFE_S

TRACE = Path(__file__).parents[3] / "shared" / "traces" / "conversation_trace.jsonl.gz"
WORKERS, BLOCKS_PER_WORKER, BLOCK_SIZE = 16, 1_000_000 // 512, 512


@dataclass
class Node:
    memory: DecayingSum = field(default_factory=lambda: DecayingSum(RECENT_HALF_LIFE_S))
    blocks: OrderedDict[BlockKey, None] = field(default_factory=OrderedDict)  # least recently used first
    computed_tokens: int = 0

    def touch(self, keys: list[BlockKey]) -> list[BlockKey]:
        """Use `keys`; returns what had to be evicted for them."""
        for key in reversed(keys):  # a prefix is used after its descendants, so that it is evicted after them
            self.blocks[key] = None
            self.blocks.move_to_end(key)
        return [self.blocks.popitem(last=False)[0] for _ in range(len(self.blocks) - BLOCKS_PER_WORKER)]


def replay(policy: str) -> tuple[float, float]:
    """(hit ratio of tokens, max : mean of computed tokens), without queueing, timestamps jittered over 3 s."""
    jitter = random.Random(1)
    with gzip.open(TRACE, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    rows = sorted(((row["timestamp"] / 1e3 + 3 * jitter.random(), row) for row in rows), key=lambda pair: pair[0])
    index, nodes = PrefixIndex(), [Node() for _ in range(WORKERS)]
    total = hits = 0
    for turn, (now_s, row) in enumerate(rows):
        keys = [BlockKey(number.to_bytes(16, "big")) for number in row["hash_ids"]]
        depths = index.match(keys)
        candidates = [
            Candidate(
                worker_id=f"{slot:02d}",
                role=Role.MIXED,
                alive=True,
                incompatible="",
                max_model_len=1 << 20,
                max_sequences=256,
                total_blocks=BLOCKS_PER_WORKER,
                block_bytes=1,
                load=LoadView(recent_tokens=node.memory.value(now_s)),
                matched_blocks=depths.get(slot, 0),
            )
            for slot, node in enumerate(nodes)
        ]
        tokens = row["input_length"]
        chosen = POLICIES[policy].decide(Need(Phase.PROMPT, tokens, 1, BLOCK_SIZE), candidates, turn).chosen
        assert chosen is not None
        slot = int(chosen.worker_id)
        hit = min(chosen.matched_blocks * BLOCK_SIZE, tokens)
        index.removed(slot, nodes[slot].touch(keys))
        index.stored(slot, keys)
        nodes[slot].memory.add(tokens - hit, now_s)
        nodes[slot].computed_tokens += tokens - hit
        total, hits = total + tokens, hits + hit
    computed = [node.computed_tokens for node in nodes]
    return hits / total, max(computed) * WORKERS / sum(computed)


@pytest.mark.skipif(not TRACE.exists(), reason=f"{TRACE.name} is not beside the project")
def test_cost_finds_prefixes_and_balances() -> None:
    hit_ratio, imbalance = replay("cost")
    blind_hit_ratio, _ = replay("round_robin")
    assert hit_ratio >= 0.32
    assert imbalance <= 1.05
    assert hit_ratio > 3 * blind_hit_ratio
