"""What `ai-dynamo-runtime` takes for its own hash and find, of the same prompt and fleet: JSON.

Run with the Python of an environment that has it, `python router/bench/dynamo_peer.py`: it imports nothing of pdserve.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from importlib import import_module

WORKERS, PROMPT_TOKENS, BLOCK_SIZE, MEMBERSHIPS, REPEATS = 64, 8192, 16, 1_000_000, 1000
_EVENT_BLOCKS = 512


def main() -> None:
    core = import_module("dynamo._core")
    draw = random.Random(1)
    tokens = [draw.randrange(49_152) for _ in range(PROMPT_TOKENS)]
    tree = core.RadixTree()
    hashes = core.compute_block_hash_for_seq(tokens, BLOCK_SIZE)
    sequence = [draw.getrandbits(63) for _ in hashes]
    number = 0
    for worker in range(WORKERS):
        blocks = [(draw.getrandbits(63), draw.getrandbits(63)) for _ in range(MEMBERSHIPS // WORKERS)]
        held = list(zip(sequence, hashes, strict=True))[: len(hashes) // 2]
        for stored in (*(blocks[at : at + _EVENT_BLOCKS] for at in range(0, len(blocks), _EVENT_BLOCKS)), held):
            number += 1
            named = [{"block_hash": block, "tokens_hash": content} for block, content in stored]
            event = {"event_id": number, "dp_rank": 0, "data": {"stored": {"parent_hash": None, "blocks": named}}}
            tree.apply_event(worker, json.dumps(event).encode())
    found = {
        "hash_us": _quantiles(lambda: core.compute_block_hash_for_seq(tokens, BLOCK_SIZE)),
        "find_us": _quantiles(lambda: tree.find_matches(hashes)),
        "hash_and_find_us": _quantiles(lambda: tree.find_matches(core.compute_block_hash_for_seq(tokens, BLOCK_SIZE))),
    }
    print(json.dumps(found))


def _quantiles(call: Callable[[], object]) -> dict[str, float]:
    took = []
    for _ in range(REPEATS):
        began_s = time.perf_counter()
        call()
        took.append(time.perf_counter() - began_s)
    took.sort()
    return {"p50": round(took[REPEATS // 2] * 1e6, 1), "p99": round(took[REPEATS * 99 // 100] * 1e6, 1)}


if __name__ == "__main__":
    main()
