"""The pool gets what utilisation, weights, other processes and a step's own memory leave; else the numbers are told."""

from __future__ import annotations

import pytest
import torch

from pdserve.errors import ConfigError
from pdserve.worker.device_memory import DeviceMemory, check_weights_fit, num_blocks

GIB = 1 << 30
GPU = torch.device("cuda", 0)


def test_the_pool_gets_what_is_left() -> None:
    memory = DeviceMemory(total=100 * GIB, free=70 * GIB, own=30 * GIB)
    assert num_blocks(GIB, 5 * GIB, memory, 0.9) == 90 - 30 - 5 - 1  # one is the scratch block
    assert num_blocks(GIB, 5 * GIB, memory, 0.45) == 45 - 30 - 5 - 1


def test_others_on_the_same_gpu_leave_less() -> None:
    assert num_blocks(GIB, 5 * GIB, DeviceMemory(100 * GIB, free=20 * GIB, own=30 * GIB), 0.9) == 20 - 5 - 1


def test_no_room_is_told_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match=r"6.0 GiB of 80.0 GiB are free, a step takes 2.0 GiB"):
        num_blocks(GIB, 2 * GIB, DeviceMemory(80 * GIB, 6 * GIB, 74 * GIB), 0.95)


def test_weights_that_do_not_fit_are_told_before_they_are_loaded() -> None:
    memory = DeviceMemory(total=80 * GIB, free=80 * GIB)
    check_weights_fit(71 * GIB, memory, 0.9, GPU)
    with pytest.raises(ConfigError, match=r"140.0 GiB, and cuda:0 has 72.0 GiB"):
        check_weights_fit(140 * GIB, memory, 0.9, GPU)
