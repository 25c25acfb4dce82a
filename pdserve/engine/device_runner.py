"""The runner for a device that works by itself: a step is queued on it and read later.

    launch: build on the host ──> copy ──> forward, logits, sampling on the device ──> copy back      nobody waits
    collect: wait for that copy alone

A step launched behind another takes its token ids from where that one will have put them. Rows that need more than the
device's sampler (penalties, biases, grammars, logprobs) are sampled on the host from their logits; steps that have such
a row are not looked beyond.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pdserve.engine.decode_graphs import DecodeGraphs
from pdserve.engine.device_sampler import RowParams, chooser, columns, plain
from pdserve.engine.runner import Flight, Model, Runner, build_batch, ready_rows, sampling_rows, verified
from pdserve.engine.sampler import Sampled, Sampler, SamplingRow
from pdserve.engine.scheduler import Chunk, Plan
from pdserve.kernels.base import Batch


class Planner(Protocol):
    """Brings a batch of the host to the device, as the kernels there want it."""

    def plan(self, batch: Batch, pool: Tensor, dtype: torch.dtype) -> Batch: ...


class Mover:
    """The planner of kernels that take a batch as it is."""

    def plan(self, batch: Batch, pool: Tensor, dtype: torch.dtype) -> Batch:
        device = pool.device
        return Batch(
            positions=batch.positions.to(device),
            query_start=batch.query_start.to(device),
            context_len=batch.context_len.to(device),
            block_tables=batch.block_tables.to(device),
            max_query_len=batch.max_query_len,
        )


@dataclass(frozen=True, slots=True)
class _DeviceFlight(Flight):
    """`sampled` is empty until it is collected."""

    ready: list[Chunk]
    rows: list[SamplingRow]
    on_device: Tensor  # [rows] int64: what a step launched behind this one reads
    tokens: Tensor  # the same on the host, once `done`
    logits: Tensor | None  # [host rows, vocab] of those sampled on the host
    done: torch.cuda.Event | None


class DeviceRunner(Runner):
    """`pool` has one block more than the scheduler knows of: `scratch`, which rows that fill up a graph write to."""

    def __init__(self, model: Model, pool: Tensor, sampler: Sampler, planner: Planner, dtype: torch.dtype) -> None:
        super().__init__(model, pool, sampler)
        self._planner = planner
        self._dtype = dtype  # of hidden states
        self._choose = chooser(pool.device)
        self._cuda = pool.device.type == "cuda"
        self.graphs: DecodeGraphs | None = None

    def enter_thread(self) -> None:
        """A thread begins with the first GPU; events, graphs and Triton's kernels are those of the current one."""
        if self._cuda:
            torch.cuda.set_device(self.pool.device)

    def foresees(self, plan: Plan) -> bool:
        return all(plain(row) for chunk in plan.chunks for row in sampling_rows(chunk))

    @torch.inference_mode()
    def launch(self, plan: Plan, after: Flight | None = None) -> Flight:
        assert after is None or isinstance(after, _DeviceFlight)
        ahead = int(after is not None)
        token_ids, batch = build_batch(plan.chunks, ahead)
        inputs = (
            self._to_device(token_ids) if after is None else after.on_device[self._to_device(_sources(plan, after))]
        )
        starts = batch.query_start.tolist()
        ready, last_rows = ready_rows(plan, starts)
        rows = [row for chunk in ready for row in sampling_rows(chunk, ahead)]
        params = RowParams(*self._to_device(torch.from_numpy(columns(rows))))
        if self.graphs is not None and self.graphs.fits(batch, rows):
            logits, tokens = self.graphs.run(inputs, batch, params)
        else:
            hidden = self.model.forward(inputs, self._planner.plan(batch, self.pool, self._dtype), self.pool)
            self.describe_prompts(plan, starts, hidden)
            if not rows:
                return self._flight(plan, [], [], torch.empty(0, dtype=torch.int64, device=hidden.device), None)
            if len(last_rows) < hidden.shape[0]:
                hidden = hidden[self._to_device(torch.tensor(last_rows))]
            logits = self.model.logits(hidden)
            tokens = self._choose(logits, params)
        special = [i for i, row in enumerate(rows) if not plain(row)]
        host_logits = logits[self._to_device(torch.tensor(special))] if special else None
        return self._flight(plan, ready, rows, tokens, host_logits)

    @torch.inference_mode()
    def collect(self, flight: Flight) -> list[list[Sampled]]:
        assert isinstance(flight, _DeviceFlight)
        if flight.done is not None:
            flight.done.synchronize()
        sampled = [Sampled(token_id) for token_id in flight.tokens.tolist()]
        if flight.logits is not None:
            special = [i for i, row in enumerate(flight.rows) if not plain(row)]
            on_host = self.sampler.sample(flight.logits.cpu(), [flight.rows[i] for i in special])
            for i, each in zip(special, on_host, strict=True):
                sampled[i] = each
        return verified(flight.ready, sampled)

    def _flight(
        self, plan: Plan, ready: list[Chunk], rows: list[SamplingRow], tokens: Tensor, logits: Tensor | None
    ) -> _DeviceFlight:
        host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=self._cuda)
        host.copy_(tokens, non_blocking=True)
        done = None
        if self._cuda:
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        return _DeviceFlight(plan, [], ready, rows, tokens, host, logits, done)

    def _to_device(self, host: Tensor) -> Tensor:
        """Pinned memory is given back to torch's allocator, which knows when the copy has left it."""
        return (host.pin_memory() if self._cuda else host).to(self.pool.device, non_blocking=True)


def _sources(plan: Plan, after: _DeviceFlight) -> Tensor:
    """For each chunk the row of the step before that samples its token."""
    rows = {id(chunk.sequence): row for row, chunk in enumerate(after.ready)}
    return torch.tensor([rows[id(chunk.sequence)] for chunk in plan.chunks], dtype=torch.int64)
