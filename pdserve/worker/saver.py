"""Write-behind: every block that becomes full here goes to the store, in batches, when there is time for it.

    committed by a step ──> backlog ── begin: slots for what the store lacks ──> held in the pool, copied ──> commit

Nothing waits for it. A backlog that is full drops its oldest blocks: they are saved by whoever computes them next.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from kvstore.pool import BlockRef, HoldKind
from kvstore.store.client import StoreClient
from kvstore.store.handles import SaveSlot
from pdserve.engine.engine import Engine
from pdserve.engine.scheduler import Committed
from pdserve.worker.engine_thread import EngineThread
from pdserve.worker.memory import BlockMemory
from pdserve.worker.metrics import WorkerMetrics

BATCH_BLOCKS = 32
BACKLOG_BYTES = 512 << 20
_HOLD_S = 30.0  # a batch takes milliseconds


class Saver:
    """Use on the asyncio loop only."""

    def __init__(
        self,
        client: StoreClient,
        engine: EngineThread,
        memory: BlockMemory,
        metrics: WorkerMetrics,
        num_blocks: int,
    ) -> None:
        self._client = client
        self._engine = engine
        self._memory = memory
        self._metrics = metrics
        # Held blocks are out of the running sequences' reach: never more than a small part of the pool.
        self._batch = max(1, min(BATCH_BLOCKS, num_blocks // 8))
        self._backlog: deque[Committed] = deque(maxlen=max(self._batch, BACKLOG_BYTES // memory.block_bytes))
        self._filled = asyncio.Event()
        self._stopping = False
        self._numbers = itertools.count(1)
        self._thread = ThreadPoolExecutor(1, "store-save")

    def add(self, committed: Iterable[Committed]) -> None:
        before = len(self._backlog)
        added = list(committed)
        self._backlog.extend(added)
        self._metrics.save_dropped.inc(before + len(added) - len(self._backlog))
        self._metrics.save_backlog.set(len(self._backlog))
        if added:
            self._filled.set()

    async def run(self) -> None:
        """Save until `stop`. Not to be cancelled: a thread may be reading."""
        while True:
            await self._filled.wait()
            if self._stopping:
                return
            batch = self._next_batch()
            if not self._backlog:
                self._filled.clear()
            self._metrics.save_backlog.set(len(self._backlog))
            await self._save(batch)

    def stop(self) -> None:
        """Have `run` return after the batch in hand; what is in the backlog is not saved."""
        self._stopping = True
        self._filled.set()

    def close(self) -> None:
        """To be called when `run` has returned."""
        self._thread.shutdown(wait=False)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _next_batch(self) -> list[Committed]:
        """The oldest blocks, as far as they are of one tenant."""
        batch: list[Committed] = []
        while self._backlog and len(batch) < self._batch and (not batch or self._backlog[0].tenant == batch[0].tenant):
            batch.append(self._backlog.popleft())
        return batch

    async def _save(self, batch: Sequence[Committed]) -> None:
        begun = await self._client.begin_save([(block.key, block.parent) for block in batch], batch[0].tenant)
        wanted = [(block, slot) for block, slot in zip(batch, begun, strict=True) if slot is not None]
        if not wanted:
            return
        owner = f"save {next(self._numbers)}"
        saved: list[tuple[SaveSlot, int]] = []
        try:
            refs = await self._engine.ask(lambda engine, now_s: _hold(engine, owner, [b for b, _ in wanted], now_s))
            pairs = [(slot, ref) for (_, slot), ref in zip(wanted, refs, strict=True) if ref is not None]
            loop = asyncio.get_running_loop()
            saved = await loop.run_in_executor(self._thread, self._copy, pairs)
        finally:
            self._engine.post(lambda engine, now_s: engine.pool.release(owner))
        self._client.publish(saved)
        written = {slot.slot for slot, _ in saved}
        await self._client.abandon_save([slot for _, slot in wanted if slot.slot not in written])
        self._metrics.save_bytes.inc(len(saved) * self._memory.block_bytes)

    def _copy(self, pairs: Sequence[tuple[SaveSlot, BlockRef]]) -> list[tuple[SaveSlot, int]]:
        """On the thread. The checksum is that of our own bytes: a copy that went wrong does not pass it."""
        saved = []
        for slot, ref in pairs:
            saved.append((slot, self._memory.read(ref.block_id, slot.data)))
        return saved


def _hold(engine: Engine, owner: str, blocks: Sequence[Committed], now_s: float) -> list[BlockRef | None]:
    """On the engine's thread: the blocks that are still here, held; None for each that was evicted meanwhile.

    With each block all those before it are held: let go of together they are as recent as each other, tail first, so
    that no child outlives its parent in the pool.
    """
    engine.pool.open(owner, HoldKind.SAVE, now_s, now_s + _HOLD_S)
    ends: dict[int, Committed] = {}  # the last block of each chain
    for block in blocks:
        if (last := ends.get(id(block.chain))) is None or last.index < block.index:
            ends[id(block.chain)] = block
    held = {chain: engine.pool.acquire(owner, list(last.chain[: last.index + 1])) for chain, last in ends.items()}
    refs = [held[id(block.chain)] for block in blocks]
    return [run[block.index] if block.index < len(run) else None for block, run in zip(blocks, refs, strict=True)]
