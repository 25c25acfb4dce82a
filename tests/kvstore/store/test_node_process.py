"""A node and its workers as real processes: what one saves another reads; whoever dies, nothing leaks or lies."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from kvstore.errors import Unavailable
from kvstore.keys import BlockKey
from kvstore.store.client import StoreClient
from kvstore.store.tier import Tier
from kvstore.transfer.checksum import block_checksum
from tests.kvstore.store.blocks import BLOCK_BYTES, FINGERPRINT, attach, chain, content, entries, read, save
from tests.kvstore.store.ledgers import DEADLINE_S, ledger, until
from tests.kvstore.store.node_process import ROOT, NodeProcess, start_node


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeProcess]:
    running = start_node(tmp_path)
    yield running
    running.process.kill()
    running.process.wait()


@pytest.fixture
async def client(node: NodeProcess) -> AsyncIterator[StoreClient]:
    attached = await attach(node.socket)
    yield attached
    await attached.close()


async def until_attached(client: StoreClient) -> None:
    """To a node that was started anew: a call finds out that the old one is gone, should that not be known yet."""
    await client.lookup(chain(0, 1))
    async with asyncio.timeout(DEADLINE_S):
        while not client.attached:
            await asyncio.sleep(0.02)


async def start_worker(node: NodeProcess, what: str) -> asyncio.subprocess.Process:
    """A worker process that attaches, does `what` with the blocks of chain(1, 4), says so, and waits to be killed."""
    script = f"""
import asyncio
from tests.kvstore.store.blocks import attach, chain, entries
async def main():
    client = await attach({node.socket!r}, "doomed")
    held = {what}
    print("ready", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""
    worker = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", script),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert worker.stdout is not None
    assert await asyncio.wait_for(worker.stdout.readline(), DEADLINE_S) == b"ready\n"
    return worker


async def test_one_worker_saves_another_reads(node: NodeProcess, client: StoreClient) -> None:
    keys = chain(1, 8)
    assert await client.lookup(keys) == []
    assert await save(client, keys) == 8
    assert await save(client, keys) == 0
    other = await attach(node.socket, "other")
    assert await other.lookup([*keys, *chain(2, 1)]) == [Tier.HOST] * 8
    lease = await other.load([*keys, *chain(2, 1)], 1.0)
    assert (await ledger(node))["by_state"]["held"] == 8
    assert read(lease) == ["host"] * 8
    await other.close()
    await until(node, "held", 0)


async def test_an_uncommitted_block_is_not_found(client: StoreClient) -> None:
    (slot,) = await client.begin_save(entries(chain(1, 1)))
    assert slot is not None
    assert await client.lookup(chain(1, 1)) == []
    await client.abandon_save([slot])
    assert await save(client, chain(1, 1)) == 1


async def test_another_model_is_refused_with_a_sentence(node: NodeProcess, client: StoreClient) -> None:
    with pytest.raises(Unavailable, match="another model, dtype or layout"):
        await StoreClient.attach(node.socket, fingerprint=b"x" * 16, block_bytes=BLOCK_BYTES, owner="other")


async def test_a_salted_tenant_hits_its_own_blocks_only(client: StoreClient) -> None:
    await save(client, chain(1, 3, b"a"))
    assert len(read(await client.load(chain(1, 3, b"a"), 1.0))) == 3
    assert read(await client.load(chain(1, 3, b"b"), 1.0)) == []


async def test_a_corrupt_block_is_dropped_when_it_is_reported(client: StoreClient) -> None:
    keys = chain(1, 3)
    await save(client, keys)
    with await client.load(keys, 1.0) as lease:
        lease.blocks[1].data[17] ^= 1
    assert await client.report_corrupt(keys) == 1
    assert await client.lookup(keys) == [Tier.HOST]
    assert await save(client, keys) == 1


async def test_the_slots_of_a_worker_killed_while_saving_come_back(node: NodeProcess, client: StoreClient) -> None:
    worker = await start_worker(node, "await client.begin_save(entries(chain(1, 4)))")
    assert (await ledger(node))["by_state"]["receiving"] == 4
    assert await save(client, chain(1, 4)) == 0
    worker.kill()
    await worker.wait()
    await until(node, "receiving", 0)
    await until(node, "quarantined", 0)
    assert await client.lookup(chain(1, 4)) == []
    assert await save(client, chain(1, 4)) == 4


async def test_a_frozen_worker_keeps_its_slots_quarantined_until_it_has_died(node: NodeProcess) -> None:
    worker = await start_worker(node, "[await client.begin_save(entries(chain(1, 4))), await client.close()]")
    await until(node, "quarantined", 4)  # its session is over, and it may still write
    worker.send_signal(signal.SIGSTOP)
    worker.kill()
    await worker.wait()
    await until(node, "free", (await ledger(node))["total_blocks"])


async def test_the_leases_of_a_worker_killed_while_reading_end(node: NodeProcess, client: StoreClient) -> None:
    await save(client, chain(1, 4))
    worker = await start_worker(node, "await client.load(chain(1, 4), 1.0)")
    assert (await ledger(node))["by_state"]["held"] == 4
    worker.kill()
    await worker.wait()
    await until(node, "held", 0)


async def test_without_its_node_a_worker_misses_and_finds_the_next_one(tmp_path: Path) -> None:
    node = start_node(tmp_path)
    client = await attach(node.socket)
    (slot,) = await client.begin_save(entries(chain(1, 1)))
    assert slot is not None
    node.kill()  # during a save
    slot.data[:] = content(slot.key)  # the memory is still ours to write
    await client.commit_save([(slot, 0)])
    assert await client.lookup(chain(1, 1)) == []
    assert read(await client.load(chain(1, 1), 1.0)) == []
    assert await client.begin_save(entries(chain(1, 1))) == [None]
    node = start_node(tmp_path)
    try:
        await until_attached(client)
        assert await client.lookup(chain(1, 1)) == []
        await client.commit_save([(slot, 0)])  # of another life: changes nothing
        assert await client.lookup(chain(1, 1)) == []
        assert await save(client, chain(1, 2)) == 2
        assert len(read(await client.load(chain(1, 2), 1.0))) == 2
        assert len(list(Path("/dev/shm").glob("pdserve-node-*"))) == 1, "the killed node's arena is removed"
    finally:
        await client.close()
        assert node.stop() == 0


async def test_a_frozen_node_costs_one_bounded_wait(node: NodeProcess, client: StoreClient) -> None:
    await save(client, chain(1, 2))
    node.process.send_signal(signal.SIGSTOP)
    try:
        assert await client.lookup(chain(1, 2)) == [Tier.HOST] * 2, "to read the arena takes no node"
        assert read(await client.load(chain(1, 2), 1.0)) == ["host"] * 2
        assert await client.lookup(chain(2, 1)) == []
        assert not client.attached
        assert await client.lookup(chain(1, 2)) == []
    finally:
        node.process.send_signal(signal.SIGCONT)
    await until_attached(client)
    assert await client.lookup(chain(1, 2)) == [Tier.HOST] * 2


async def test_a_restart_keeps_what_is_on_disk(tmp_path: Path) -> None:
    options = ("--disk-bytes", "64MiB", "--disk-path", str(tmp_path / "disk"), "--policy", "all")
    node = start_node(tmp_path, *options)
    client = await attach(node.socket)
    keys: list[BlockKey] = chain(1, 40)
    assert await save(client, keys) == 40
    assert node.stop() == 0
    node = start_node(tmp_path, *options)
    try:
        await until_attached(client)
        assert await client.lookup(keys) == [Tier.DISK] * 40
        assert read(await client.load(keys, DEADLINE_S)) == ["disk"] * 40
        assert read(await client.load(keys, DEADLINE_S)) == ["host"] * 40
        other = chain(1, 40, b"other")
        assert await client.lookup(other) == []
    finally:
        await client.close()
        node.kill()


async def test_too_little_shared_memory_leaves_the_node_without_a_host_tier(tmp_path: Path) -> None:
    node = start_node(tmp_path, "--host-bytes", "900000GiB")
    client = await attach(node.socket)
    try:
        assert client.attached
        assert await save(client, chain(1, 1)) == 0
        assert read(await client.load(chain(1, 1), 1.0)) == []
    finally:
        await client.close()
        node.kill()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--disk-bytes", "64MiB", "--disk-path", "{folder}/file"), "name another --disk-path"),
        (("--redis", "localhost:6379"), "not a Redis URL"),
    ],
)
def test_what_it_cannot_use_ends_its_start(tmp_path: Path, options: tuple[str, ...], reason: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeError, match=reason) as failed:
        start_node(tmp_path, *(option.format(folder=tmp_path) for option in options))
    assert "\n" not in str(failed.value), "one sentence"


def test_the_fingerprint_of_these_tests_is_one() -> None:
    assert len(FINGERPRINT) == 16


async def test_a_worker_that_lost_its_session_keeps_only_what_it_still_writes(
    node: NodeProcess, client: StoreClient
) -> None:
    writing, given_up = await client.begin_save(entries(chain(1, 2)))
    assert writing is not None
    assert given_up is not None
    node.process.send_signal(signal.SIGSTOP)
    try:
        assert await client.lookup(chain(2, 1)) == []
        await client.abandon_save([given_up])  # the node does not hear it
    finally:
        node.process.send_signal(signal.SIGCONT)
    await until_attached(client)
    assert (await ledger(node))["by_state"]["quarantined"] == 1
    await client.abandon_save([writing])
    assert (await ledger(node))["by_state"]["quarantined"] == 0


async def test_a_cancelled_save_keeps_no_slot(node: NodeProcess, client: StoreClient) -> None:
    saving = asyncio.create_task(client.begin_save(entries(chain(1, 5))))
    await asyncio.sleep(0)
    saving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await saving
    await until(node, "free", (await ledger(node))["total_blocks"])
    assert await save(client, chain(1, 5)) == 5


async def test_a_cancelled_load_keeps_no_lease(node: NodeProcess, client: StoreClient) -> None:
    await save(client, chain(1, 5))
    loading = asyncio.create_task(client.load(chain(1, 6), 1.0))  # the last one must be asked for
    await asyncio.sleep(0)
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    await client.lookup(chain(1, 6))  # answered after the load was
    await until(node, "held", 0)


async def test_a_lease_that_is_only_told_holds_until_it_is_released(node: NodeProcess, client: StoreClient) -> None:
    await save(client, chain(1, 5))
    lease = await client.load(chain(1, 5), 1.0)
    await until(node, "held", 5)
    total = (await ledger(node))["total_blocks"]
    for seed in range(2, 2 + total // 500 + 1):  # more than there is room for
        await save(client, chain(seed, 500))
    assert read(lease) == ["host"] * 5
    await until(node, "held", 0)


async def test_a_block_that_left_its_slot_is_told_from_a_corrupt_one(node: NodeProcess, client: StoreClient) -> None:
    await save(client, chain(1, 1))
    late = await client.load(chain(1, 1), 1.0)
    late.release()  # and read all the same, as by who is slower than his lease
    await until(node, "held", 0)
    for seed in range(2, 2 + (await ledger(node))["total_blocks"] // 500 + 1):
        await save(client, chain(seed, 500))
    block = late.blocks[0]
    assert block_checksum(block.data.copy()) != block.checksum
    assert await client.report_corrupt([block.key]) == 0
    assert await client.lookup([block.key]) == []
