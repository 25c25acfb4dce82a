"""From the store into the pool: brings the leading blocks of a prompt that this worker lacks before it is scheduled.

    leading run here? ── look-up ──> plan (fetch or compute) ── lease ──> blocks taken in the pool
        ──> copied and verified on a thread of its own ──> committed: the scheduler finds them like any cached prefix

Whatever goes wrong, the prompt is scheduled with what it has: the store can make a request faster, never fail it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from kvstore.errors import NoRoom
from kvstore.keys import BlockKey
from kvstore.pool import BlockRef, HoldKind, PoolEvents
from kvstore.store.client import StoreClient
from kvstore.store.handles import LeasedBlock
from kvstore.store.tier import Tier
from pdserve.engine.engine import Engine
from pdserve.worker.engine_thread import EngineThread
from pdserve.worker.fetch import FetchPlanner
from pdserve.worker.memory import BlockMemory
from pdserve.worker.metrics import WorkerMetrics

log = logging.getLogger(__name__)

_AT_ONCE = 4  # prompts that load; the others wait their turn
_PART = 32  # blocks copied in one call of the thread


@dataclass(frozen=True, slots=True)
class _Taken:
    """Fresh blocks of the pool for the blocks of a lease from `first` on."""

    first: int
    refs: tuple[BlockRef, ...]


class Loader:
    """Use on the asyncio loop only. Times in seconds."""

    def __init__(
        self,
        client: StoreClient,
        engine: EngineThread,
        memory: BlockMemory,
        metrics: WorkerMetrics,
        planner: FetchPlanner,
    ) -> None:
        self._client = client
        self._engine = engine
        self._memory = memory
        self._metrics = metrics
        self._planner = planner
        self._visible: set[BlockKey] = set()  # in the pool, as of the last step
        self._turn = asyncio.Semaphore(_AT_ONCE)
        self._thread = ThreadPoolExecutor(1, "store-load")

    def on_events(self, events: PoolEvents) -> None:
        self._visible.update(events.stored)
        self._visible.difference_update(events.removed)

    async def load(self, owner: str, keys: Sequence[BlockKey]) -> tuple[Tier, ...]:
        """Bring what pays of the leading blocks `keys` into the pool. Not to be cancelled: a thread may be writing.

        Args:
            owner: holds the blocks while they are copied; unique.

        Returns:
            The tiers of the blocks that were loaded, in order. Never raises.
        """
        held = self._num_visible(keys)
        if held == len(keys):
            return ()
        async with self._turn:
            missing = keys[held:]
            tiers = await self._client.lookup(missing)
            plan = self._planner.plan(tiers)
            if not plan.num_blocks:
                return ()
            began_s = time.monotonic()
            with await self._client.load(missing[: plan.num_blocks], plan.deadline_s) as lease:
                loaded = await self._take_over(owner, keys, held, lease.blocks, lease.expires_s)
            elapsed_s = time.monotonic() - began_s
            self._planner.fetched(loaded, elapsed_s)
            self._metrics.on_load(loaded, self._memory.block_bytes, elapsed_s)
            return loaded

    def close(self) -> None:
        """To be called when no `load` is under way."""
        self._thread.shutdown(wait=False)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _num_visible(self, keys: Sequence[BlockKey]) -> int:
        return next((count for count, key in enumerate(keys) if key not in self._visible), len(keys))

    async def _take_over(
        self, owner: str, keys: Sequence[BlockKey], held: int, blocks: Sequence[LeasedBlock], expires_s: float
    ) -> tuple[Tier, ...]:
        """Copy the leased blocks, which follow the first `held` of `keys`, into the pool."""
        if not blocks:
            return ()
        wanted = keys[: held + len(blocks)]
        taken: _Taken | None = None
        verified = 0
        try:
            taken = await self._engine.ask(lambda engine, now_s: _take(engine, owner, wanted, held, now_s, expires_s))
            if taken is not None:
                leased = blocks[taken.first : taken.first + len(taken.refs)]
                verified = await self._copy(leased, taken.refs)
        finally:
            done = taken.refs[:verified] if taken is not None else ()
            first_key = held + (taken.first if taken is not None else 0)
            self._engine.post(lambda engine, now_s: _commit(engine, owner, wanted[first_key:], done))
        if taken is None:
            return ()
        return tuple(block.tier for block in blocks[taken.first : taken.first + verified])

    async def _copy(self, blocks: Sequence[LeasedBlock], refs: Sequence[BlockRef]) -> int:
        """How many leading blocks are there and verified; what is not as it should be is reported, and ends the run."""
        loop = asyncio.get_running_loop()
        verified = 0
        for start in range(0, len(refs), _PART):
            part = list(zip(blocks[start : start + _PART], refs[start : start + _PART], strict=True))
            good = await loop.run_in_executor(self._thread, self._copy_part, part)
            verified += good
            if good < len(part):
                self._metrics.corrupt_blocks.inc(await self._client.report_corrupt([part[good][0].key]))
                break
        return verified

    def _copy_part(self, part: Sequence[tuple[LeasedBlock, BlockRef]]) -> int:
        """On the thread."""
        for count, (block, ref) in enumerate(part):
            if self._memory.write(ref.block_id, block.data) != block.checksum:
                return count
        return len(part)


# --- on the engine's thread ------------------------------------------------------------------------------------------


def _take(
    engine: Engine, owner: str, keys: Sequence[BlockKey], held: int, now_s: float, deadline_s: float
) -> _Taken | None:
    """Hold the prefix that is here, so that making room does not evict it, and blocks for the rest; None for no room.

    `keys` ends with the last leased block, of which the first follows `held` of them.
    """
    pool = engine.pool
    pool.open(owner, HoldKind.LOAD, now_s, deadline_s)
    here = len(pool.acquire(owner, keys))
    count = len(keys) - here
    spare = pool.num_available - len(engine.scheduler.running) - 1  # running sequences need blocks to decode on
    if here < held or count <= 0 or count > spare:
        pool.release(owner)
        return None
    try:
        return _Taken(here - held, tuple(pool.allocate(owner, count)))
    except NoRoom:
        pool.release(owner)
        return None


def _commit(engine: Engine, owner: str, keys: Sequence[BlockKey], refs: Sequence[BlockRef]) -> None:
    """Publish the verified blocks and let go of everything; the newest cached blocks are the last to be evicted."""
    if engine.pool.holds(owner):
        for ref, key in zip(refs, keys, strict=False):
            engine.pool.commit(owner, ref, key)
        engine.pool.release(owner)
