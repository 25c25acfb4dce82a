"""From a worker's settings to its engine: weights, kernels, KV pool, warmed up."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvstore.layout import BlockGeometry
from kvstore.pool import BlockPool
from pdserve.devices import resolve_device
from pdserve.engine.config import EngineConfig
from pdserve.engine.engine import Engine
from pdserve.engine.native_sampler import fastest_sampler
from pdserve.engine.runner import Runner
from pdserve.engine.torch_sampler import TorchSampler
from pdserve.errors import ConfigError
from pdserve.kernels import choose
from pdserve.kernels.base import Kernels
from pdserve.launch.folders import cache_folder
from pdserve.models.config import ModelConfig, load_config
from pdserve.models.decoder import Decoder
from pdserve.models.weights import TORCH_DTYPES, Weights, open_weights, place, random_weights, weight_bytes
from pdserve.worker.config import WorkerConfig
from pdserve.worker.device_engine import capture_graphs, device_engine, measured_blocks
from pdserve.worker.device_memory import DeviceMemory, check_weights_fit

Progress = Callable[[str], None]

CPU_KV_BYTES = 1 << 30  # of the pool, if nobody says
# They map all weights and make every first call. The largest chunk would take a start 0.6 s more (1.3 s in float32),
# and the first of them that is asked for 0.02 s less.
_CPU_WARM_UP_TOKENS = 32
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


@dataclass(frozen=True, slots=True)
class Built:
    """The engine and what the rest of the worker needs to know of it."""

    engine: Engine
    geometry: BlockGeometry
    fingerprint: bytes
    eos_token_ids: tuple[int, ...]
    vocab_size: int


def build_engine(config: WorkerConfig, progress: Progress) -> Built:
    """Load the model and make the pool. Raises ConfigError with one sentence that says what to do."""
    torch.set_num_threads(config.threads)
    _keep_freed_memory()
    device = resolve_device(config.device)
    model = load_config(config.model)
    progress("loading weights")
    weights = _load_weights(config, model, device)
    group = model.num_heads // model.num_kv_heads
    kernels = choose(config.kernels, model.head_dim, group, device, TORCH_DTYPES[config.dtype])
    kv_dtype = config.kv_dtype or config.dtype
    if kv_dtype != config.dtype and not (kv_dtype == "fp8_e4m3" and kernels.name == "flashinfer"):
        raise ConfigError(
            f"--kv-dtype {kv_dtype} beside --dtype {config.dtype} is not possible with the {kernels.name} kernels;"
            " fp8_e4m3 needs a GPU with FlashInfer."
        )
    geometry = BlockGeometry(config.block_size, model.num_layers, model.num_kv_heads, model.head_dim, kv_dtype)
    num_blocks = _num_blocks(config, model, weights, kernels, geometry)
    max_model_len = config.max_model_len or min(model.max_position_embeddings, num_blocks * config.block_size)
    limits = _limits(config, num_blocks, max_model_len)
    decoder = Decoder(model, weights, kernels, max_model_len)
    sampler = TorchSampler() if kernels.name == "reference" else fastest_sampler(config.threads)
    if device.type == "cpu":
        pool = make_pool(num_blocks, geometry)
        engine = Engine(limits, BlockPool(num_blocks, config.block_size), Runner(decoder, pool, sampler))
    else:
        engine = device_engine(decoder, geometry, limits, sampler)
    progress("warming up")
    if device.type == "cpu":
        engine.warm_up(_CPU_WARM_UP_TOKENS)
    else:
        engine.warm_up()
        capture_graphs(engine, decoder, progress)
    return Built(engine, geometry, geometry.fingerprint(decoder.kv_identity), model.eos_token_ids, model.vocab_size)


def _load_weights(config: WorkerConfig, model: ModelConfig, device: torch.device) -> Weights:
    if device.type != "cpu":
        if config.weights != "dense":
            raise ConfigError(f"--weights {config.weights} runs on the CPU; on {device} weights are dense.")
        needed = weight_bytes(model, config.dtype)
        check_weights_fit(needed, DeviceMemory.of(device), config.gpu_memory_utilization, device)
    if config.load_format == "dummy":
        return random_weights(model, config.dtype, 0, device)
    weights = open_weights(config.model, model, config.dtype, cache_folder(), config.weights)
    return weights if device.type == "cpu" else place(weights, device)


def _num_blocks(
    config: WorkerConfig, model: ModelConfig, weights: Weights, kernels: Kernels, geometry: BlockGeometry
) -> int:
    on_cpu = weights.final_norm.device.type == "cpu"
    if config.kv_bytes is None and not on_cpu:
        few = config.max_batched_tokens + 2
        tried = Decoder(model, weights, kernels, few)
        return measured_blocks(tried, geometry, _limits(config, few, few), config.gpu_memory_utilization)
    kv_bytes = CPU_KV_BYTES if config.kv_bytes is None else config.kv_bytes
    num_blocks = kv_bytes // geometry.block_bytes
    if num_blocks < 1:
        raise ConfigError(f"--kv-bytes {kv_bytes} holds no block of {geometry.block_bytes} bytes")
    return num_blocks


def _limits(config: WorkerConfig, num_blocks: int, max_model_len: int) -> EngineConfig:
    return EngineConfig(
        num_blocks=num_blocks,
        block_size=config.block_size,
        max_batched_tokens=config.max_batched_tokens,
        max_sequences=config.max_sequences,
        max_model_len=max_model_len,
        speculate_tokens=config.speculate_tokens,
        handoff_s=config.limits.handoff_s,
    )


def _keep_freed_memory() -> None:
    """Have malloc keep what a step frees: pages mapped anew cost a prefill step a tenth (docs/results.md)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def make_pool(num_blocks: int, geometry: BlockGeometry) -> torch.Tensor:
    """The KV pool's memory, `[num_blocks, kv_heads, layers, 2, block_size, head_dim]`.

    Zeroed, because a kernel may read (and then mask) what lies behind a context's end; the system does it page by page
    as blocks are first used. Huge pages make decode attention a fifth faster (docs/results.md). Prompts can be read
    from KV, so it stays out of core dumps. Raises ConfigError for more than the system gives.
    """
    num_bytes = num_blocks * geometry.block_bytes
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"A KV pool of {num_bytes} bytes could not be had ({error}): lower --kv-bytes.") from error
    memory.madvise(mmap.MADV_HUGEPAGE)
    memory.madvise(mmap.MADV_DONTDUMP)
    return torch.frombuffer(memory, dtype=TORCH_DTYPES[geometry.dtype]).view(num_blocks, *geometry.shape)
