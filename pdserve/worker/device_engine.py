"""An engine on a GPU: pool from measured memory, steps launched ahead, decode batches as graphs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import torch

from kvstore.layout import BlockGeometry
from kvstore.pool import BlockPool
from pdserve.engine.config import EngineConfig
from pdserve.engine.decode_graphs import DecodeGraphs, cuda_recorder, graph_sizes
from pdserve.engine.device_runner import DeviceRunner, Mover
from pdserve.engine.device_sampler import chooser
from pdserve.engine.engine import Engine
from pdserve.engine.sampler import Sampler
from pdserve.engine.torch_sampler import TorchSampler
from pdserve.kernels.flashinfer import FlashInferKernels
from pdserve.models.decoder import Decoder
from pdserve.models.weights import TORCH_DTYPES
from pdserve.worker.device_memory import GRAPHS_KEEP_BYTES, DeviceMemory, num_blocks, peak_bytes

log = logging.getLogger(__name__)

_GROUPED_ON_DEVICE = (9, 10)  # major compute capabilities on which torch's grouped product does not wait for the host


def measured_blocks(decoder: Decoder, geometry: BlockGeometry, limits: EngineConfig, utilization: float) -> int:
    """How many blocks the pool may have; runs the largest step with a pool that is just large enough."""
    device = decoder.weights.final_norm.device
    few = -(-(limits.max_batched_tokens + 2) // limits.block_size) + 1
    tried = replace(limits, num_blocks=few, max_model_len=limits.max_batched_tokens + 2)
    step_bytes = peak_bytes(lambda: device_engine(decoder, geometry, tried, TorchSampler()).warm_up(), device)
    return num_blocks(geometry.block_bytes, step_bytes, DeviceMemory.of(device), utilization)


def device_engine(decoder: Decoder, geometry: BlockGeometry, limits: EngineConfig, sampler: Sampler) -> Engine:
    """Not warmed up, without graphs; `sampler` is for what the device's own does not know."""
    device = decoder.weights.final_norm.device
    shape = (limits.num_blocks + 1, *geometry.shape)  # the last is the scratch block
    # One allocation, which a transport registers once. Zeros: a kernel may read, and mask, what lies behind a context.
    pool = torch.zeros(shape, dtype=TORCH_DTYPES[geometry.dtype], device=device)
    kernels = decoder.kernels
    planner = kernels if isinstance(kernels, FlashInferKernels) else Mover()
    runner = DeviceRunner(decoder, pool, sampler, planner, decoder.weights.final_norm.dtype)
    runner.enter_thread()
    return Engine(limits, BlockPool(limits.num_blocks, limits.block_size), runner)


def capture_graphs(engine: Engine, decoder: Decoder, progress: Callable[[str], None]) -> None:
    """To be called when the engine is warm; kernels other than FlashInfer's cannot be captured."""
    runner, kernels, limits = engine.runner, decoder.kernels, engine.config
    if not isinstance(kernels, FlashInferKernels) or not isinstance(runner, DeviceRunner):
        return
    device = runner.pool.device
    if decoder.config.experts is not None and torch.cuda.get_device_capability(device)[0] not in _GROUPED_ON_DEVICE:
        log.warning("decode runs without graphs: torch's grouped product asks the host on %s", device)
        return
    graphs = DecodeGraphs(
        decoder,
        runner.pool,
        kernels,
        decoder.weights.final_norm.dtype,
        chooser(device),
        -(-limits.max_model_len // limits.block_size),
        cuda_recorder(device),
    )
    graphs.capture(
        graph_sizes(limits.max_sequences), lambda: DeviceMemory.of(device).free > GRAPHS_KEEP_BYTES, progress
    )
    runner.graphs = graphs
