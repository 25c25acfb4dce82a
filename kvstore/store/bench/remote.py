"""Fetching from another node over UCX, shared memory and TCP, against what the transfer plane itself moves."""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from kvstore.keys import BlockKey
from kvstore.store.bench.blocks import FINGERPRINT, chain, make_blocks, put
from kvstore.store.bench.processes import store_node
from kvstore.store.client import StoreClient
from kvstore.store.tier import Tier
from kvstore.transfer.bench import measure

_BLOCK_KIB = 360
_NUM_BLOCKS = 256  # as many as a batch of the transfer plane's own benchmark
_ROUNDS = 9
_DEADLINE_S = 20.0


@dataclass(frozen=True, slots=True)
class RemoteResult:
    """From the call until all blocks are verified in this node's host tier and leased.

    The share is of the plane's own figure, measured before and after.
    """

    path: str
    block_kib: int
    gb_per_s: float
    transfer_gb_per_s: float
    share_of_transfer: float


async def measure_remote(folder: Path, redis: str, *, same_host: bool) -> RemoteResult:
    name = "shared memory" if same_host else "tcp"
    plane = [(await asyncio.to_thread(measure, _BLOCK_KIB, same_host=same_host)).gb_per_s]
    block_bytes = _BLOCK_KIB << 10
    arena = ("--host-bytes", str((_ROUNDS + 2) * _NUM_BLOCKS * block_bytes), "--redis", redis, "--namespace", name[:3])
    with (
        store_node(folder, f"owner-{name[:3]}", *arena, "--host", "127.0.0.1" if same_host else "127.0.0.2") as there,
        store_node(folder, f"asker-{name[:3]}", *arena) as here,
    ):
        clients = [
            await StoreClient.attach(path, fingerprint=FINGERPRINT, block_bytes=block_bytes, owner="bench")
            for path in (there, here)
        ]
        source = make_blocks(_NUM_BLOCKS, block_bytes)
        chains = [chain(f"{name} {n}", _NUM_BLOCKS) for n in range(_ROUNDS + 1)]
        for keys in chains:
            await put(clients[0], keys, source)
        times_s = []
        for keys in chains:
            await _until_located(clients[1], keys)
            began_s = time.perf_counter()
            lease = await clients[1].load(keys, _DEADLINE_S)
            times_s.append(time.perf_counter() - began_s)
            if [block.tier for block in lease.blocks] != [Tier.REMOTE] * _NUM_BLOCKS:
                raise RuntimeError("the blocks did not come from the other node")
            lease.release()
        for client in clients:
            await client.close()
    plane.append((await asyncio.to_thread(measure, _BLOCK_KIB, same_host=same_host)).gb_per_s)
    speed = source.nbytes / statistics.median(times_s[1:]) / 1e9  # the first one dials
    return RemoteResult(name, _BLOCK_KIB, speed, statistics.mean(plane), speed / statistics.mean(plane))


async def _until_located(client: StoreClient, keys: list[BlockKey]) -> None:
    async with asyncio.timeout(_DEADLINE_S):
        while await client.lookup(keys) != [Tier.REMOTE] * len(keys):
            await asyncio.sleep(0.01)
