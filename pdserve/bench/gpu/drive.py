"""What the parts share: an engine for a shape, sequences for it, and clocks that wait for the device."""

from __future__ import annotations

import gc
import statistics
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from kvstore.keys import root_key
from kvstore.layout import KvDtype
from pdserve.bench.gpu.shapes import write_shape
from pdserve.engine.engine import Engine
from pdserve.engine.sequence import Sequence
from pdserve.request import SamplingParams
from pdserve.worker.build import Built, build_engine
from pdserve.worker.config import Role, TransportName, WorkerConfig


@dataclass(frozen=True, slots=True)
class Setup:
    """Where and what to check."""

    device: torch.device
    shape: str
    scratch: Path  # a folder of ours
    kv_bytes: int | None = None  # None: what the device has
    transport: TransportName = "ucx"  # between workers

    @property
    def dtype(self) -> KvDtype:
        return "float32" if self.device.type == "cpu" else "bfloat16"

    def build(self, model: Path | None = None, *, share: float = 0.9, max_batched_tokens: int = 8192) -> Built:
        """With random weights, the same for every call, unless there is a `model`."""
        config = WorkerConfig(
            role=Role.MIXED,
            worker_id="bench",
            model=model or write_shape(self.shape, self.scratch / self.shape),
            device=str(self.device),
            dtype=self.dtype,
            kv_bytes=self.kv_bytes,
            gpu_memory_utilization=share,
            max_batched_tokens=max_batched_tokens,
            load_format="auto" if model else "dummy",
        )
        return build_engine(config, lambda text: None)


def add(
    engine: Engine, name: str, prompt: list[int], max_tokens: int, *, prefill_only: bool = False, queue: bool = True
) -> Sequence:
    """Greedy."""
    sequence = Sequence(
        name=name,
        token_ids=array("I", prompt),
        num_prompt_tokens=len(prompt),
        sampling=SamplingParams(max_tokens=max_tokens, seed=0, temperature=0.0),
        root_key=root_key(name.encode()),  # nobody's prefix is shared
        block_size=engine.config.block_size,
        arrived_s=0.0,
        prefill_only=prefill_only,
    )
    if queue:
        engine.scheduler.add(sequence)
    return sequence


def random_prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = torch.randint(1, 500, (length,), generator=generator).tolist()
    return tokens


def step(engine: Engine, *, look_ahead: bool = True) -> None:
    engine.execute(engine.schedule(0.0), 0.0, look_ahead=look_ahead)


def run_to_end(engine: Engine) -> None:
    """As the worker's thread does."""
    while engine.in_flight or not engine.idle:
        step(engine)


def finish_all(engine: Engine) -> None:
    """Whatever is under way is given up."""
    while engine.in_flight:
        step(engine, look_ahead=False)
    for sequence in [*engine.scheduler.running, *engine.scheduler.waiting]:
        engine.finish(sequence)
    engine.pool.clear_cached()


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def give_back(device: torch.device) -> None:
    """What the parts before left of the device's memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def elapsed_s(work: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    """Median of a few, after one that does not count; each waits for the device."""
    times_s = []
    for _ in range(rounds + 1):
        wait_for(device)
        began_s = time.perf_counter()
        work()
        wait_for(device)
        times_s.append(time.perf_counter() - began_s)
    return statistics.median(times_s[1:])
