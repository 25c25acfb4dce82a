"""A decision for a long prompt over a large fleet: keys, look-up and scoring apart. Microseconds, p50 and p99."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

from kvstore.keys import BlockKey, KeyChain, block_keys, root_key
from router.index import PrefixIndex
from router.policy import POLICIES, Candidate, LoadView, Need, Phase, Role

WORKERS = 64
PROMPT_TOKENS = 8192
BLOCK_SIZE = 16
MEMBERSHIPS = 1_000_000
_REPEATS = 300


def measure_decision() -> dict[str, Any]:
    """Half of the prompt is held by every second worker; its quarter, to a block of its own, by each other one."""
    draw = random.Random(1)
    tokens = tuple(draw.randrange(49_152) for _ in range(PROMPT_TOKENS))
    root = root_key(b"bench")
    keys = block_keys(root, tokens, BLOCK_SIZE)
    index, events = _filled(draw, keys)
    need = Need(Phase.PROMPT, PROMPT_TOKENS, 64, BLOCK_SIZE)

    def decide() -> None:
        depths = index.match(KeyChain(root, tokens, BLOCK_SIZE))
        POLICIES["cost"].decide(need, [_candidate(slot, depths.get(slot, 0)) for slot in range(WORKERS)], 0)

    candidates = [_candidate(slot, 256) for slot in range(WORKERS)]
    return {
        "all_keys_us": _quantiles(lambda: block_keys(root, tokens, BLOCK_SIZE)),
        "look_up_us": _quantiles(lambda: index.match(keys)),
        "keys_and_look_up_us": _quantiles(lambda: index.match(KeyChain(root, tokens, BLOCK_SIZE))),
        "score_us": _quantiles(lambda: POLICIES["cost"].decide(need, candidates, 0)),
        "keys_look_up_and_score_us": _quantiles(decide),
        **events,
    }


def _filled(draw: random.Random, keys: list[BlockKey]) -> tuple[PrefixIndex, dict[str, float]]:
    index = PrefixIndex()
    each = MEMBERSHIPS // WORKERS
    others = [[BlockKey(draw.randbytes(16)) for _ in range(each)] for _ in range(WORKERS)]
    began_s = time.perf_counter()
    for slot, stored in enumerate(others):
        index.stored(slot, stored)
    stored_s = time.perf_counter() - began_s
    began_s = time.perf_counter()
    index.remove_worker(0)
    removed_s = time.perf_counter() - began_s
    for slot in range(WORKERS):
        index.stored(slot, keys[: len(keys) // 2 if slot % 2 else len(keys) // 4 - slot])
    return index, {
        "stored_blocks_per_s": round(WORKERS * each / stored_s),
        "removed_blocks_per_s": round(each / removed_s),
    }


def _candidate(slot: int, matched_blocks: int) -> Candidate:
    return Candidate(
        worker_id=f"w{slot:02d}",
        role=Role.MIXED,
        alive=True,
        incompatible="",
        max_model_len=1 << 17,
        max_sequences=64,
        total_blocks=1 << 16,
        block_bytes=1 << 18,
        load=LoadView(waiting_tokens=slot, recent_tokens=100.0 * slot, sequences=slot % 8, free_blocks=4096),
        matched_blocks=matched_blocks,
    )


def _quantiles(call: Callable[[], object]) -> dict[str, float]:
    took: list[float] = []
    for _ in range(_REPEATS):
        began_s = time.perf_counter()
        call()
        took.append(time.perf_counter() - began_s)
    took.sort()
    return {"p50": round(took[_REPEATS // 2] * 1e6, 1), "p99": round(took[_REPEATS * 99 // 100] * 1e6, 1)}
