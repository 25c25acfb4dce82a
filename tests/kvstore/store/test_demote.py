"""A node that is told to end saves to disk what only its host tier has, whatever was used how often."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstore.store.tier import Tier
from tests.kvstore.store.blocks import attach, chain, read, save
from tests.kvstore.store.node_process import start_node


@pytest.mark.parametrize(("policy", "kept"), [("second-touch", True), ("all", True), ("none", False)])
async def test_blocks_saved_once_outlive_an_orderly_end(tmp_path: Path, policy: str, kept: bool) -> None:
    options = ("--disk-bytes", "64MiB", "--disk-path", str(tmp_path / "disk"), "--policy", policy)
    chains = [chain(seed, 20) for seed in (1, 2)]
    first = start_node(tmp_path, *options)
    try:
        client = await attach(first.socket)
        for keys in chains:
            assert await save(client, keys) == 20
        await client.close()
        assert first.stop() == 0
    finally:
        first.kill()
    second = start_node(tmp_path, *options)
    try:
        client = await attach(second.socket)
        for keys in chains:
            assert await client.lookup(keys) == ([Tier.DISK] * 20 if kept else [])
            assert read(await client.load(keys, 5.0)) == (["disk"] * 20 if kept else [])
        await client.close()
    finally:
        second.kill()
