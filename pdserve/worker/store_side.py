"""What a worker does with the store of its machine: loads before a prompt is scheduled, saves behind every step."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from kvstore.background import keep_running
from kvstore.keys import BlockKey
from kvstore.store.client import StoreClient
from kvstore.store.tier import Tier
from pdserve.protocol import worker_pb2 as pb
from pdserve.worker.engine_thread import EngineThread, StepReport
from pdserve.worker.fetch import FetchPlanner
from pdserve.worker.loader import Loader
from pdserve.worker.memory import BlockMemory
from pdserve.worker.metrics import WorkerMetrics
from pdserve.worker.saver import Saver

_PREFETCHES = 4  # under way


class StoreSide:
    """Use on the asyncio loop only; `close` while the engine still runs."""

    def __init__(
        self,
        client: StoreClient,
        engine: EngineThread,
        memory: BlockMemory,
        metrics: WorkerMetrics,
        *,
        block_size: int,
        num_blocks: int,
    ) -> None:
        self._client = client
        self._planner = FetchPlanner(block_size, memory.block_bytes)
        self._loader = Loader(client, engine, memory, metrics, self._planner)
        self._saver = Saver(client, engine, memory, metrics, num_blocks)
        self._saving = keep_running(self._saver.run, "write-behind")
        self._tasks: set[asyncio.Task[None]] = set()
        self._prefetching = 0
        self._most_prefetched = num_blocks // 4  # blocks: the rest is for what runs
        self._numbers = itertools.count(1)

    def on_node(self, changed: Callable[[], None]) -> None:
        """`changed` is called whenever `report` says something else."""
        self._client.on_change(changed)

    def report(self) -> pb.StoreReport:
        """The node that it is attached to."""
        node = self._client.node
        if node is None:
            return pb.StoreReport()
        return pb.StoreReport(address=node.address, incarnation=node.incarnation, shares=node.shares)

    def prefetch(self, keys: Sequence[BlockKey]) -> None:
        """Bring leading blocks into the pool before a prompt asks for them, if that is faster than to compute them."""
        if self._prefetching < _PREFETCHES and keys:
            self._prefetching += 1
            self.start(self._prefetch(keys[: self._most_prefetched]))

    async def _prefetch(self, keys: Sequence[BlockKey]) -> None:
        try:
            await self._loader.load(f"prefetch {next(self._numbers)}", keys)
        finally:
            self._prefetching -= 1

    async def load(self, owner: str, keys: Sequence[BlockKey]) -> tuple[Tier, ...]:
        """As `Loader.load`; to be called from a task given to `start`."""
        return await self._loader.load(owner, keys)

    def start(self, task: Coroutine[Any, Any, None]) -> None:
        """Run a task that loads; `close` waits for it."""
        started = asyncio.ensure_future(task)
        self._tasks.add(started)
        started.add_done_callback(self._tasks.discard)

    def on_step(self, report: StepReport) -> None:
        self._loader.on_events(report.events)
        self._saver.add(report.committed)
        if report.prefill_tokens:
            self._planner.computed(report.prefill_tokens, report.step_s)

    async def close(self, timeout_s: float) -> None:
        """Wait for what a thread is copying, for a bounded time: an engine that hangs answers nothing any more."""
        self._saver.stop()
        await asyncio.wait({self._saving, *self._tasks}, timeout=timeout_s)
        await self._client.close()
        self._loader.close()
        self._saver.close()
