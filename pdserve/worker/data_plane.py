"""The transport that a worker's blocks move by."""

from __future__ import annotations

from functools import partial

import torch

from kvstore.transfer.nixl import NixlTransport
from kvstore.transfer.transport import Memory, Transport
from kvstore.transfer.ucx import UcxTransport
from pdserve.worker.config import TransportName
from pdserve.worker.memory import BlockMemory


def open_transport(name: TransportName, memory: BlockMemory, scratch: Memory, device: torch.device) -> Transport:
    """
    Args:
        scratch: what links are tried out with; like the blocks.

    Raises:
        Unavailable: the package for it is not installed.
    """
    settle = None if device.type == "cpu" else partial(torch.cuda.synchronize, device)
    return NixlTransport((memory.whole(), scratch), settle) if name == "nixl" else UcxTransport(settle)
