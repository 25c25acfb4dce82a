"""Memory of a device is a buffer like any other to those who can reach it, and is refused by those who cannot."""

from __future__ import annotations

import numpy as np
import pytest

from kvstore.transfer.contract import check_operation
from kvstore.transfer.loopback import LoopbackNetwork, LoopbackTransport
from kvstore.transfer.transport import Completion, DeviceBuffer


def test_it_tells_where_it_lies() -> None:
    owner = np.zeros(64, np.uint8)
    buffer = DeviceBuffer(owner.ctypes.data, owner.nbytes, owner)
    check_operation(1, buffer, writable=True)
    described = buffer.__cuda_array_interface__
    assert described["data"] == (owner.ctypes.data, False)
    assert described["shape"] == (64,)


def test_an_empty_one_is_refused() -> None:
    with pytest.raises(ValueError, match="not empty"):
        check_operation(1, DeviceBuffer(4096, 0, None), writable=False)


def test_a_transport_that_cannot_reach_it_refuses_it() -> None:
    transport = LoopbackTransport(LoopbackNetwork())
    ended: list[Completion] = []
    link = transport.open(ended.append, same_host=True)
    with pytest.raises(ValueError, match="host memory only"):
        link.receive(1, DeviceBuffer(4096, 64, None))
    transport.close()
    assert not ended
