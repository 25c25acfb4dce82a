"""Redis: the index with a million blocks, and the same server holding the values themselves."""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import dataclass

from kvstore.store.bench.blocks import chain, make_blocks
from kvstore.store.locations import Locations, NodeRecord, connect
from kvstore.store.tier import Tier

_NUM_BLOCKS = 1_000_000
_PREFIX = 512
_CALLS = 200
_VALUE_CALLS = 100


@dataclass(frozen=True, slots=True)
class IndexResult:
    """Of a million registered blocks; a look-up asks for a prefix that another node has."""

    num_blocks: int
    bytes_per_block: float
    registered_per_s: float
    prefix_blocks: int
    lookup_p50_ms: float
    lookups_per_s: float


@dataclass(frozen=True, slots=True)
class ValueResult:
    """Redis holding the blocks, one call a block, over its Unix socket."""

    block_kib: int
    set_gb_per_s: float
    get_gb_per_s: float
    set_call_us: float
    get_call_us: float


async def measure_index(url: str) -> IndexResult:
    owner = NodeRecord(1, "owner", "127.0.0.1:1", "bench")
    asker = NodeRecord(2, "asker", "127.0.0.1:2", "bench")
    client, _, _ = connect(url)
    writing = Locations(url, "index", owner, ttl_s=3600)
    asking = Locations(url, "index", asker, timeout_s=1.0)
    before = (await client.info("memory"))["used_memory"]
    keys = chain("index", _NUM_BLOCKS)
    began_s = time.perf_counter()
    for start in range(0, _NUM_BLOCKS, 100_000):
        writing.announce(Tier.HOST, keys[start : start + 100_000])
        await writing.flush()
    await writing.renew()
    register_s = time.perf_counter() - began_s
    after = (await client.info("memory"))["used_memory"]
    times_s = []
    for n in range(_CALLS):
        prefix = keys[n * 1000 : n * 1000 + _PREFIX]
        began_s = time.perf_counter()
        located = await asking.locate(prefix)
        times_s.append(time.perf_counter() - began_s)
        if len(located) != _PREFIX:
            raise RuntimeError(f"{len(located)} of {_PREFIX} blocks were located")
    for locations in (writing, asking):
        await locations.close()
    await client.flushall()
    await client.aclose()
    return IndexResult(
        _NUM_BLOCKS,
        (after - before) / _NUM_BLOCKS,
        _NUM_BLOCKS / register_s,
        _PREFIX,
        1e3 * statistics.median(times_s),
        1 / statistics.mean(times_s),
    )


async def measure_values(url: str, block_kib: int) -> ValueResult:
    client, _, _ = connect(url)
    block = make_blocks(1, block_kib << 10)[0]
    data = block.tobytes()
    set_s, get_s = [], []
    for n in range(_VALUE_CALLS):
        began_s = time.perf_counter()
        await client.set(f"value {n}", data)
        set_s.append(time.perf_counter() - began_s)
    for n in range(_VALUE_CALLS):
        began_s = time.perf_counter()
        if len(await client.get(f"value {n}")) != block.nbytes:
            raise RuntimeError("Redis gave another value")
        get_s.append(time.perf_counter() - began_s)
    await client.flushall()
    await client.aclose()
    await asyncio.sleep(0)
    put, get = statistics.median(set_s), statistics.median(get_s)
    return ValueResult(block_kib, block.nbytes / put / 1e9, block.nbytes / get / 1e9, 1e6 * put, 1e6 * get)
