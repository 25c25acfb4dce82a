"""`pdserve kv` against a real store node: what it prints is true, what it does is done."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import grpc.aio
import pytest
from typer.testing import CliRunner

from kvstore.store import store_pb2 as pb
from kvstore.store.store_pb2_grpc import StorePeerStub
from kvstore.store.tier import Tier
from pdserve.cli import app
from pdserve.errors import ConfigError
from tests.kvstore.store.blocks import BLOCK_BYTES, attach, chain, save
from tests.kvstore.store.node_process import NodeProcess, start_node


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeProcess]:
    running = start_node(tmp_path, "--disk-bytes", "16MiB", "--disk-path", str(tmp_path / "disk"), "--policy", "all")
    yield running
    running.kill()


def kv(node: NodeProcess, *arguments: str, exit_code: int = 0) -> str:
    result = CliRunner().invoke(app, ["kv", arguments[0], "--socket", node.socket, *arguments[1:]])
    assert result.exit_code == exit_code, result.output
    return result.output


async def test_stat_ls_pin_evict_verify(node: NodeProcess) -> None:
    keys = chain(1, 4)
    client = await attach(node.socket)
    await save(client, keys, tenant="acme")
    stat = json.loads(kv(node, "stat", "--json"))
    assert stat["tiers"][0]["blocks"] == "4"
    assert stat["tenant_bytes"] == {"acme": str(4 * BLOCK_BYTES)}
    assert "4 cached" in kv(node, "stat")

    assert "4 of 4 blocks pinned" in kv(node, "pin", "--hard", *(key.hex() for key in keys))
    listed = json.loads(kv(node, "ls", "--json"))
    host = [block for block in listed if block["tier"] == "host"]
    assert {(block["key"], block["tenant"], block["pin"]) for block in host} == {
        (key.hex(), "acme", "hard") for key in keys
    }
    assert "0 blocks evicted" in kv(node, "evict", "--tier", "host", keys[2].hex())
    assert "4 of 4 blocks unpinned" in kv(node, "pin", "--seconds", "0", *(key.hex() for key in keys))
    assert "2 blocks evicted" in kv(node, "evict", "--tier", "host", keys[2].hex())

    with await client.load(keys[:1], 1.0) as lease:
        lease.blocks[0].data[3] ^= 1
    assert "1 were corrupt" in kv(node, "verify", exit_code=1)
    assert "0 were corrupt" in kv(node, "verify")
    kv(node, "evict", "--all")
    assert await client.lookup(keys) == []
    await client.close()


def test_a_node_that_is_not_there_is_told_in_a_sentence(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["kv", "stat", "--socket", str(tmp_path / "none.sock")])
    assert isinstance(result.exception, ConfigError)
    assert "does not do that" in str(result.exception)


async def test_subscribers_get_a_snapshot_and_then_every_change(node: NodeProcess) -> None:
    client = await attach(node.socket)
    await save(client, chain(1, 2))
    async with grpc.aio.insecure_channel(node.address) as channel:
        stream = StorePeerStub(channel).Watch(pb.WatchRequest())
        held: set[tuple[int, bytes]] = set()
        while (event := await stream.read()).kind != pb.KvEvent.SNAPSHOT_END:
            held.update((event.tier, event.keys[start : start + 16]) for start in range(0, len(event.keys), 16))
        assert {(Tier.HOST, key) for key in chain(1, 2)} <= held
        sequence = event.sequence
        await save(client, chain(2, 3))
        kv(node, "evict", "--tier", "host", chain(2, 1)[0].hex())
        seen: list[tuple[int, int]] = []
        while (pb.KvEvent.REMOVED, Tier.HOST) not in seen:
            event = await stream.read()
            assert event.sequence == sequence + 1
            sequence = event.sequence
            seen.append((event.kind, event.tier))
            if seen[-1] == (pb.KvEvent.REMOVED, Tier.HOST):
                assert event.keys == b"".join(reversed(chain(2, 3)))
        assert (pb.KvEvent.STORED, Tier.HOST) in seen
    await client.close()
