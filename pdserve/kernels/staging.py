"""From host arrays to the device in one copy that nobody waits for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Staging:
    """Pinned memory that is written again only once the copy before has left it.

    A copy from pinned memory is queued like a kernel: with steps launched ahead it may not have begun when the next
    step is built, and would then carry that step's numbers. `wait` before writing, `sent` once the copies are queued.
    What a library copies from pinned memory of its own between the two is covered too (FlashInfer's `plan`).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned = torch.empty(0, dtype=torch.int32)
        self._sent = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        if self._sent is not None:
            self._sent.synchronize()

    def sent(self) -> None:
        if self._sent is not None:
            self._sent.record(torch.cuda.current_stream(self._device))

    def upload(self, arrays: Sequence[NDArray[np.int32]], into: Tensor | None = None) -> list[Tensor]:
        """int32 arrays -> the same on the device, as views of one tensor: of `into`, int32, if given."""
        sizes = [array.size for array in arrays]
        total = sum(sizes)
        if total > self._pinned.numel():
            self._pinned = torch.empty(2 * total, dtype=torch.int32, pin_memory=self._sent is not None)
        host = self._pinned[:total]
        np.concatenate([array.reshape(-1) for array in arrays], out=host.numpy())
        device = torch.empty(total, dtype=torch.int32, device=self._device) if into is None else into[:total]
        device.copy_(host, non_blocking=True)
        flats = torch.split(device, sizes)
        return [flat.view(array.shape) for flat, array in zip(flats, arrays, strict=True)]
