"""How much of a GPU's memory the KV pool gets, decided from what was measured. Pure, but for the measuring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pdserve.errors import ConfigError

GRAPHS_KEEP_BYTES = 1 << 30  # left free when no more graphs are captured


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes; `free` is what nobody uses, other processes included, `own` what this one has."""

    total: int
    free: int
    own: int = 0

    @classmethod
    def of(cls, device: torch.device) -> DeviceMemory:
        free, total = torch.cuda.mem_get_info(device)
        return cls(total, free, torch.cuda.memory_allocated(device))


def check_weights_fit(weight_bytes: int, memory: DeviceMemory, utilization: float, device: torch.device) -> None:
    """Raises ConfigError with the numbers."""
    usable = usable_bytes(memory, utilization)
    if weight_bytes > usable:
        raise ConfigError(
            f"The weights take {gib(weight_bytes)}, and {device} has {gib(usable)} for them: {gib(memory.free)} of"
            f" {gib(memory.total)} are free, and --gpu-memory-utilization is {utilization}."
        )


def num_blocks(block_bytes: int, step_bytes: int, memory: DeviceMemory, utilization: float) -> int:
    """
    Args:
        step_bytes: what the largest step takes beside weights and pool, measured.
        memory: with the weights in place.

    Raises:
        ConfigError: not even one block fits; with the numbers.
    """
    left = usable_bytes(memory, utilization) - step_bytes
    if left < 2 * block_bytes:
        raise ConfigError(
            f"No memory is left for the KV pool: with the weights in place {gib(memory.free)} of {gib(memory.total)}"
            f" are free, a step takes {gib(step_bytes)}, and --gpu-memory-utilization is {utilization}. Raise it, lower"
            " --max-batched-tokens, or take a smaller model."
        )
    return left // block_bytes - 1  # one is the scratch block


def usable_bytes(memory: DeviceMemory, utilization: float) -> int:
    """What may still be taken, so that this process has `utilization` of the whole, as far as others leave it."""
    return min(int(memory.total * utilization) - memory.own, memory.free)


def peak_bytes(work: Callable[[], None], device: torch.device) -> int:
    """Memory that `work` takes for a while."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    return peak


def gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
