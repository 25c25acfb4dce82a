"""Checksums on the GPU are those of the host."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvstore.transfer.checksum import block_checksum

ROOT = Path(__file__).parents[3]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton comes with torch's CUDA builds")
def test_blocks_of_every_length_interpreted() -> None:
    code = "from tests.pdserve.kernels.test_checksum import check; check()"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, timeout=250)
    assert done.returncode == 0, done.stderr.decode()


def check() -> None:
    """Lengths around a stripe (64 bytes) and a round (1,024)."""
    from pdserve.kernels.triton_checksum import BlockHasher

    generator = torch.Generator().manual_seed(0)
    for num_bytes in (248, 256, 264, 1016, 1024, 1032, 1088, 2048, 2056, 65536, 65536 + 72):
        blocks = torch.randint(256, (5, num_bytes), dtype=torch.uint8, generator=generator)
        wanted = [3, 0, 4, 3]
        assert BlockHasher(blocks)(wanted) == [block_checksum(blocks[each].numpy()) for each in wanted], num_bytes
    for num_bytes in (240, 1025):
        with pytest.raises(ValueError, match=f"a block has {num_bytes} bytes"):
            BlockHasher(torch.zeros(1, num_bytes, dtype=torch.uint8))
