"""The caller's part of the transport contract, as every implementation checks it: operations and handlers."""

from __future__ import annotations

import logging

import numpy as np

from kvstore.transfer.transport import Completion, CompletionHandler, DeviceBuffer, Memory

log = logging.getLogger(__name__)

MAX_OPEN_OPERATIONS = 1 << 16  # of one link; beyond it `send` and `receive` raise TransferError


def check_operation(tag: int, buffer: Memory, *, writable: bool) -> None:
    """Raises ValueError unless the tag has 64 bits and the buffer is a run of bytes (writable, to receive into)."""
    if not 0 <= tag < 1 << 64:
        raise ValueError(f"tag must lie in [0, 2**64), got {tag}")
    if isinstance(buffer, DeviceBuffer):
        if buffer.nbytes <= 0:
            raise ValueError("a transfer buffer of a device is not empty")
        return
    if buffer.dtype != np.uint8 or buffer.ndim != 1 or not buffer.flags.c_contiguous or buffer.size == 0:
        raise ValueError("a transfer buffer is a non-empty, contiguous, one-dimensional uint8 array")
    if writable and not buffer.flags.writeable:
        raise ValueError("a buffer to receive into must be writable")


def deliver(handler: CompletionHandler, completion: Completion) -> None:
    """Call the handler; a failing one must not end the thread that serves the other links."""
    try:
        handler(completion)
    except Exception:
        log.exception("a completion handler failed")
