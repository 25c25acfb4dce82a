"""The host tier between processes: put and get against memcpy, the price of a call, and four workers at once."""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import uvloop

from kvstore.keys import BlockKey
from kvstore.store.bench.blocks import FINGERPRINT, chain, get, make_blocks, memcpy_gb_per_s, put
from kvstore.store.bench.processes import store_node
from kvstore.store.bench.round_trip import round_trip_us
from kvstore.store.client import StoreClient

_BATCH_BYTES = 64 << 20
_ROUNDS = 7
_CALLS = 200
PREFIX_BLOCKS = 512
_WORKERS = 4
_SETTLE_S = 1.0  # a worker maps the arena in the background when it attaches


@dataclass(frozen=True, slots=True)
class HostResult:
    """Medians; shares are of memcpy in the same run. A call moves one block.

    A get waits for no message. A put makes one round trip (for its slot) and one more until others find the block;
    `round_trip_us` is what one costs at least here.
    """

    block_kib: int
    memcpy_gb_per_s: float
    put_gb_per_s: float
    get_gb_per_s: float
    put_share: float
    get_share: float
    put_call_us: float
    put_found_call_us: float
    get_call_us: float
    round_trip_us: float


@dataclass(frozen=True, slots=True)
class PrefixResult:
    """Look-up and lease of a prefix in one round trip; `parallel_*` with that many workers at it."""

    num_blocks: int
    p50_ms: float
    p99_ms: float
    workers: int
    parallel_p50_ms: float
    parallel_per_s: float
    alone_per_s: float


async def measure_host(folder: Path, block_kib: int) -> HostResult:
    block_bytes = block_kib << 10
    num_blocks = max(16, _BATCH_BYTES // block_bytes)
    arena = str((_ROUNDS + 2) * num_blocks * block_bytes + 3 * _CALLS * block_bytes)
    with store_node(folder, f"host-{block_kib}", "--host-bytes", arena) as path:
        client = await StoreClient.attach(path, fingerprint=FINGERPRINT, block_bytes=block_bytes, owner="bench")
        source, target = make_blocks(num_blocks, block_bytes), make_blocks(num_blocks, block_bytes)
        await asyncio.sleep(_SETTLE_S)
        before = memcpy_gb_per_s(source, target, _ROUNDS)
        chains = [chain(f"{block_kib}/{n}", num_blocks) for n in range(_ROUNDS)]
        put_s = [await _timed(partial(put, client, keys, source, until_found=False)) for keys in chains]
        get_s = [await _timed(partial(get, client, keys, target)) for keys in chains]
        one, other = ([chain(f"{name} {block_kib}/{n}", 1) for n in range(_CALLS)] for name in ("single", "found"))
        put_call_s = [await _timed(partial(put, client, keys, source, until_found=False)) for keys in one]
        found_call_s = [await _timed(partial(put, client, keys, source)) for keys in other]
        get_call_s = [await _timed(partial(get, client, keys, target)) for keys in one]
        memcpy = (before + memcpy_gb_per_s(source, target, _ROUNDS)) / 2
        await client.close()
    put_speed, get_speed = (source.nbytes / statistics.median(times_s) / 1e9 for times_s in (put_s, get_s))
    return HostResult(
        block_kib,
        memcpy_gb_per_s=memcpy,
        put_gb_per_s=put_speed,
        get_gb_per_s=get_speed,
        put_share=put_speed / memcpy,
        get_share=get_speed / memcpy,
        put_call_us=1e6 * statistics.median(put_call_s),
        put_found_call_us=1e6 * statistics.median(found_call_s),
        get_call_us=1e6 * statistics.median(get_call_s),
        round_trip_us=await asyncio.to_thread(round_trip_us),
    )


async def measure_prefix(folder: Path) -> PrefixResult:
    with store_node(folder, "prefix", "--host-bytes", str(4096 * (PREFIX_BLOCKS + 8))) as path:
        client = await StoreClient.attach(path, fingerprint=FINGERPRINT, block_bytes=4096, owner="bench")
        keys = chain("prefix", PREFIX_BLOCKS)
        await put(client, keys, make_blocks(PREFIX_BLOCKS, 4096))
        alone_s = await lease_often(client, keys)
        command = (sys.executable, "-m", "kvstore.store.bench.host", str(path))
        workers = [
            await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE) for _ in range(_WORKERS)
        ]
        outputs = await asyncio.gather(*(worker.communicate() for worker in workers))
        await client.close()
    times_s = [time_s for output, _ in outputs for time_s in json.loads(output)]
    return PrefixResult(
        PREFIX_BLOCKS,
        1e3 * statistics.median(alone_s),
        1e3 * sorted(alone_s)[len(alone_s) * 99 // 100],
        _WORKERS,
        1e3 * statistics.median(times_s),
        _WORKERS / statistics.mean(times_s),
        1 / statistics.mean(alone_s),
    )


async def lease_often(client: StoreClient, keys: list[BlockKey]) -> list[float]:
    """Seconds of each of many leases of all blocks."""
    times_s = []
    for _ in range(_CALLS):
        began_s = time.perf_counter()
        lease = await client.load(keys, 5.0)
        times_s.append(time.perf_counter() - began_s)
        if len(lease.blocks) != len(keys):
            raise RuntimeError("the store gave less than it has")
        lease.release()
        await asyncio.sleep(0)
    return times_s[_CALLS // 10 :]


async def _timed(what: Callable[[], Awaitable[None]]) -> float:
    began_s = time.perf_counter()
    await what()
    return time.perf_counter() - began_s


async def _worker(path: str) -> None:
    """A child: its times as JSON."""
    client = await StoreClient.attach(path, fingerprint=FINGERPRINT, block_bytes=4096, owner="bench child")
    print(json.dumps(await lease_often(client, chain("prefix", PREFIX_BLOCKS))))
    await client.close()


if __name__ == "__main__":
    uvloop.run(_worker(sys.argv[1]))
