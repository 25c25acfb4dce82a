"""The transport that a worker's blocks move by."""

from __future__ import annotations

import os
from functools import partial

import torch

from kvstore.errors import Unavailable
from kvstore.transfer.nixl import NixlTransport
from kvstore.transfer.transport import Memory, Transport
from kvstore.transfer.ucx import UcxTransport
from pdserve.worker.config import TransportName
from pdserve.worker.memory import BlockMemory

_ALLOCATOR, _EXPANDABLE = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"), "expandable_segments:True"


def open_transport(name: TransportName, memory: BlockMemory, scratch: Memory, device: torch.device) -> Transport:
    """
    Args:
        scratch: what links are tried out with; like the blocks.

    Raises:
        Unavailable: the package for it is not installed, or the GPU's memory is not of the kind that it can read.
    """
    settle = None if device.type == "cpu" else partial(torch.cuda.synchronize, device)
    if (
        name == "nixl"
        and settle is not None
        and _EXPANDABLE in " ".join(os.environ.get(each, "") for each in _ALLOCATOR)
    ):
        raise Unavailable("--transport nixl reads no expandable segments: take them out of PYTORCH_CUDA_ALLOC_CONF")
    return NixlTransport((memory.whole(), scratch), settle) if name == "nixl" else UcxTransport(settle)
