"""Making an engine from settings: what this machine cannot give is one clear sentence."""

from __future__ import annotations

import pytest

from kvstore.layout import BlockGeometry
from pdserve.errors import ConfigError
from pdserve.worker.build import make_pool


@pytest.mark.parametrize("num_blocks", [1 << 40, 1 << 60])
def test_a_pool_that_is_too_large_for_the_machine(num_blocks: int) -> None:
    with pytest.raises(ConfigError, match=r"could not be had .*: lower --kv-bytes"):
        make_pool(num_blocks, BlockGeometry(16, 2, 2, 64, "float32"))
