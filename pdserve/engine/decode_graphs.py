"""Decode steps as captured CUDA graphs: one launch in place of some three hundred, which the host cannot make in time.

A graph is captured for each of a few batch sizes and reads memory at fixed addresses; a smaller batch is filled up with
rows that write to the scratch block, the pool's last. The attention's plan is made outside, into the graph's memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from pdserve.engine.device_sampler import Chooser, RowParams
from pdserve.engine.runner import Model
from pdserve.engine.sampler import SamplingRow
from pdserve.kernels.base import Batch

log = logging.getLogger(__name__)

Recorder = Callable[[Callable[[], None]], Callable[[], None]]  # work on fixed memory -> its replay


class GraphPlanner(Protocol):
    """Plans into memory that stays; `pdserve.kernels.flashinfer` has the real one."""

    def plan(self, batch: Batch, pool: Tensor, dtype: torch.dtype, frame: Any = None) -> Batch: ...

    def frame(self, batch_size: int, max_blocks: int) -> Any: ...


@dataclass(frozen=True, slots=True)
class _Graph:
    frame: Any
    token_ids: Tensor  # [size] int64
    params: Tensor  # [COLUMNS, size] float64
    outputs: list[Tensor]  # logits, tokens
    replay: Callable[[], None]


class DecodeGraphs:
    """
    Args:
        max_blocks: of one sequence.
        record: see `cuda_recorder`.
    """

    def __init__(
        self,
        model: Model,
        pool: Tensor,
        planner: GraphPlanner,
        dtype: torch.dtype,
        choose: Chooser,
        max_blocks: int,
        record: Recorder,
    ) -> None:
        self._model = model
        self._pool = pool
        self._planner = planner
        self._dtype = dtype
        self._choose = choose
        self._max_blocks = max_blocks
        self._record = record
        self._graphs: dict[int, _Graph] = {}

    @property
    def sizes(self) -> list[int]:
        return sorted(self._graphs)

    def fits(self, batch: Batch, rows: Sequence[SamplingRow]) -> bool:
        """A decode batch, each row of which is sampled from, that is not larger than the largest graph."""
        count = len(batch.context_len)
        return batch.max_query_len == 1 and len(rows) == count and bool(self._graphs) and count <= max(self._graphs)

    @torch.inference_mode()
    def capture(
        self, sizes: Sequence[int], has_room: Callable[[], bool], progress: Callable[[str], None] = lambda text: None
    ) -> None:
        """The largest first: the others then live in its memory. What no longer has room runs without a graph."""
        for done, size in enumerate(sorted(sizes, reverse=True)):
            if not has_room():
                log.warning("no memory is left for graphs of %d sequences and fewer; they run without", size)
                return
            progress(f"capturing decode graphs ({done}/{len(sizes)})")
            self._graphs[size] = self._captured(size)

    def run(self, token_ids: Tensor, batch: Batch, params: RowParams) -> tuple[Tensor, Tensor]:
        """token_ids [n] int64 on the device, a decode batch on the host -> logits [n, vocab], the graph's own until the
        next step, and tokens [n]."""
        count = len(token_ids)
        size = next(size for size in self.sizes if size >= count)
        graph = self._graphs[size]
        self._planner.plan(self._filled(batch, size), self._pool, self._dtype, graph.frame)
        graph.token_ids[:count].copy_(token_ids)
        columns = (params.temperature, params.top_k, params.top_p, params.min_p, params.uniform)
        graph.params[:, :count].copy_(torch.stack(columns))
        graph.replay()
        logits, tokens = graph.outputs
        return logits[:count], tokens[:count].clone()

    def _captured(self, size: int) -> _Graph:
        device = self._pool.device
        frame = self._planner.frame(size, size * self._max_blocks)
        token_ids = torch.zeros(size, dtype=torch.int64, device=device)
        greedy = torch.tensor([[1.0], [1.0], [1.0], [0.0], [0.0]], dtype=torch.float64, device=device)
        params = greedy.repeat(1, size)
        none = torch.empty(0, dtype=torch.int32)
        empty = Batch(none, none, none, none.view(0, 1), max_query_len=1)
        batch = self._planner.plan(self._filled(empty, size), self._pool, self._dtype, frame)
        outputs: list[Tensor] = []

        def step() -> None:
            hidden = self._model.forward(token_ids, batch, self._pool)
            logits = self._model.logits(hidden)
            outputs[:] = [logits, self._choose(logits, RowParams(*params))]

        return _Graph(frame, token_ids, params, outputs, self._record(step))

    def _filled(self, batch: Batch, size: int) -> Batch:
        """Rows up to `size` that each decode the first token of a sequence in the scratch block."""
        missing = size - len(batch.context_len)
        scratch = self._pool.shape[0] - 1
        return Batch(
            positions=pad(batch.positions, (0, missing)),
            query_start=torch.arange(size + 1, dtype=torch.int32),
            context_len=pad(batch.context_len, (0, missing), value=1),
            block_tables=pad(batch.block_tables, (0, 0, 0, missing), value=scratch),
            max_query_len=1,
        )


def graph_sizes(max_sequences: int) -> list[int]:
    """1, 2, 4, 8, then multiples of 8 up to 64, of 32 beyond, and the largest itself: a filled-up row costs little."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(96, max_sequences + 1, 32)]
    return sorted({*(size for size in sizes if size < max_sequences), max_sequences})


def cuda_recorder(device: torch.device) -> Recorder:
    """Captures into one pool of memory, since only one graph runs at a time."""
    memory = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def record(work: Callable[[], None]) -> Callable[[], None]:
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            work()  # what happens at a first call may not be captured
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory, stream=stream):
            work()
        return graph.replay

    return record
