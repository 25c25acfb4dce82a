"""A decision for a long prompt over a large fleet: keys, look-up and scoring, apart and together, as the router does.

Microseconds of one core, p50 and p99. Two fleets: in one, every worker holds the first half of the prompt (what was
measured of other routers' indexes); in the other each holds a prefix of another length, so that the look-up has most to
do.
"""

from __future__ import annotations

import random
import time
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

from kvstore.keys import BlockKey, KeyChain, block_keys, root_key
from kvstore.store.tier import Tier
from router.columns import Columns, Seats
from router.index import PrefixIndex
from router.policy import POLICIES, Candidate, Decision, LoadView, Need, Phase, Role, Speed
from router.store_index import StoreIndex

WORKERS = 64
NODES = 8
PROMPT_TOKENS = 8192
BLOCK_SIZE = 16
MEMBERSHIPS = 1_000_000
_ROOT = root_key(b"bench")
_REPEATS = 1000


def measure_decision() -> dict[str, Any]:
    draw = random.Random(1)
    tokens = tuple(draw.randrange(49_152) for _ in range(PROMPT_TOKENS))
    keys = block_keys(_ROOT, tokens, BLOCK_SIZE)
    index, columns, seats = _filled_index(draw), *_fleet()
    half = len(keys) // 2
    return {
        "all_keys_us": _quantiles(lambda: block_keys(_ROOT, tokens, BLOCK_SIZE)),
        "half_held_by_all": _measure(index, columns, seats, tokens, keys, [half] * WORKERS),
        "all_prefixes_differ": _measure(index, columns, seats, tokens, keys, [2 * slot for slot in range(WORKERS)]),
        "half_held_by_all_with_stores": _measure(index, columns, seats, tokens, keys, [half] * WORKERS, _stores(keys)),
        "candidates_built_from_records_us": _quantiles(lambda: Seats.of(_records())),
    }


def _measure(
    index: PrefixIndex,
    columns: Columns,
    seats: Seats,
    tokens: tuple[int, ...],
    keys: list[BlockKey],
    depths: Sequence[int],
    stores: StoreIndex | None = None,
) -> dict[str, Any]:
    for slot, depth in enumerate(depths):
        index.removed(slot, keys)
        index.stored(slot, keys[:depth])
    need = Need(Phase.PROMPT, PROMPT_TOKENS, 64, BLOCK_SIZE)
    turn = 0

    def decide(prompt: Sequence[BlockKey]) -> Decision:
        nonlocal turn
        turn += 1
        stored = stores.match(prompt) if stores is not None else None
        candidates = columns.candidates(seats, index.match(prompt), 100.0 + 1e-3 * turn, stored=stored)
        return POLICIES["cost"].decide(need, candidates, turn)

    return {
        "look_up_us": _quantiles(lambda: index.match(keys)),
        "look_up_and_score_us": _quantiles(lambda: decide(keys).worker_id),
        "keys_look_up_and_score_us": _quantiles(lambda: decide(KeyChain(_ROOT, tokens, BLOCK_SIZE)).worker_id),
        "explain_all_candidates_us": _quantiles(lambda: decide(keys).considered),
    }


def _stores(keys: Sequence[BlockKey]) -> StoreIndex:
    """A node for each eight workers; all of the prompt lies in the last one, half of that on disk."""
    stores = StoreIndex()
    for node in range(NODES):
        stores.join(node)
        stores.stored(node, 0, Tier.DISK, keys[: (node + 1) * len(keys) // NODES])
        stores.stored(node, 0, Tier.HOST, keys[: (node + 1) * len(keys) // NODES // 2])
        stores.snapshot_ended(node, 0)
    return stores


def measure_events() -> dict[str, float]:
    """Blocks a second through the index, and the memory that it takes for one block of one worker."""
    draw = random.Random(2)
    each = MEMBERSHIPS // WORKERS
    stored = [[BlockKey(draw.randbytes(16)) for _ in range(each)] for _ in range(WORKERS)]
    index = PrefixIndex()

    def store() -> None:
        for slot, keys in enumerate(stored):
            index.stored(slot, keys)

    def remove() -> None:
        for slot, keys in enumerate(stored[:8]):
            index.removed(slot, keys)

    stored_s, removed_s = _seconds(store), _seconds(remove)
    worker_s = _seconds(lambda: index.remove_worker(8))
    return {
        "stored_blocks_per_s": round(WORKERS * each / stored_s),
        "removed_blocks_per_s": round(8 * each / removed_s),
        "blocks_per_s_of_a_worker_that_leaves": round(each / worker_s),
        "bytes_per_membership_all_different": _bytes_per_membership(shared_by=1),
        "bytes_per_membership_shared_by_8": _bytes_per_membership(shared_by=8),
    }


def _bytes_per_membership(shared_by: int) -> float:
    """The keys themselves included."""
    draw = random.Random(3)
    tracemalloc.start()
    index = PrefixIndex()
    each = MEMBERSHIPS // 4 // WORKERS
    for first in range(0, WORKERS, shared_by):
        keys = [BlockKey(draw.randbytes(16)) for _ in range(each)]
        for slot in range(first, first + shared_by):
            index.stored(slot, keys)
        del keys
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return round(used / (each * WORKERS), 1)


def _filled_index(draw: random.Random) -> PrefixIndex:
    index = PrefixIndex()
    for slot in range(WORKERS):
        index.stored(slot, (BlockKey(draw.randbytes(16)) for _ in range(MEMBERSHIPS // WORKERS)))
    return index


def _fleet() -> tuple[Columns, Seats]:
    columns = Columns()
    for slot, worker in _records():
        columns.reset(slot)
        columns.set_load(slot, worker.load)
        columns.set_speed(slot, Speed(tuple((bits, 100.0 * bits + slot) for bits in (5, 9, 13))))
        columns.add_recent(slot, 100.0 * slot, 100.0)
    return columns, Seats.of(_records())


def _records() -> list[tuple[int, Candidate]]:
    return [
        (
            slot,
            Candidate(
                worker_id=f"w{slot:02d}",
                role=Role.MIXED,
                alive=True,
                incompatible="",
                max_model_len=1 << 17,
                max_sequences=64,
                total_blocks=1 << 16,
                block_bytes=1 << 18,
                load=LoadView(waiting_tokens=slot, sequences=slot % 8, free_blocks=4096),
                store_node=slot % NODES,
                store_shares=True,
            ),
        )
        for slot in range(WORKERS)
    ]


def _seconds(call: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    call()
    return time.perf_counter() - began_s


def _quantiles(call: Callable[[], object]) -> dict[str, float]:
    took = sorted(_seconds(call) for _ in range(_REPEATS))
    return {"p50": round(took[_REPEATS // 2] * 1e6, 1), "p99": round(took[_REPEATS * 99 // 100] * 1e6, 1)}
