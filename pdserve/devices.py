"""Which device a worker computes on."""

from __future__ import annotations

import re

import torch

from pdserve.errors import ConfigError

_NAME = re.compile(r"auto|cpu|cuda(:\d+)?")


def resolve_device(name: str) -> torch.device:
    """`auto` (CUDA where there is some, else the CPU), `cpu`, `cuda` (the first) or `cuda:N`.

    Raises:
        ConfigError: no such name, or no such device here.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"The device must be auto, cpu, cuda or cuda:N, not {name!r}.")
    count = torch.cuda.device_count() if name != "cpu" and torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not count):
        return torch.device("cpu")
    index = int(name.partition(":")[2] or 0)
    if index >= count:
        why = f"it has {count} CUDA devices" if count else f"torch {torch.__version__} sees no CUDA device"
        raise ConfigError(f"The device {name} is not on this machine: {why}.")
    return torch.device("cuda", index)
