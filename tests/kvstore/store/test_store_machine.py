"""The whole store against a dict, in one process: whatever breaks, no wrong byte comes back and no slot is lost."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import tempfile
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvstore.keys import BlockKey
from kvstore.store.config import SavePolicy
from kvstore.store.directory import Directory, DirectoryWriter, directory_bytes
from kvstore.store.disk_tier import DiskTier
from kvstore.store.host_block import SlotRef
from kvstore.store.host_tier import HostTier
from kvstore.store.segment import HEADER_BYTES, PAGE_BYTES
from kvstore.store.segment_file import OsCalls
from kvstore.store.store import TieredStore
from kvstore.store.tier import Tier
from kvstore.transfer.checksum import block_checksum
from kvstore.transfer.transport import Buffer
from tests.kvstore.store.blocks import FINGERPRINT, chain, content, entries

T = TypeVar("T")

SLOTS = 8
BLOCK_BYTES = 256
RECORDS = 5  # of a segment
SEGMENT_BYTES = PAGE_BYTES + RECORDS * (HEADER_BYTES + BLOCK_BYTES)
DISK_BYTES = 4 * SEGMENT_BYTES
LONGEST = 6


class FaultyCalls(OsCalls):
    """A disk that can be full."""

    full = False

    def pwritev(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        if self.full:
            os.pwritev(fd, buffers[:1], offset)  # the last bytes that there was room for
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().pwritev(fd, buffers, offset)


class Peer:
    """Another node as the index and the data plane show it: it may lie, die in the middle, or be forgotten."""

    def __init__(self, store: TieredStore) -> None:
        self.store = store
        self.has: set[BlockKey] = set()
        self.index: set[BlockKey] = set()
        self.dies_after: int | None = None
        self.flips = False

    async def locate(self, keys: Sequence[BlockKey]) -> int:
        return next((count for count, key in enumerate(keys) if key not in self.index), len(keys))

    def announce(self, tier: Tier, keys: Sequence[BlockKey]) -> None:
        pass

    async def fetch(self, keys: Sequence[BlockKey], parent: BlockKey | None, until_s: float) -> int:
        landed: list[tuple[SlotRef, int]] = []
        for count, key in enumerate(keys[: await self.locate(keys)]):
            ref = self.store.begin_fetch("fetch", key, parent, "") if key in self.has else None
            if ref is None:
                break
            parent = key
            slot, sent = self.store.slots[ref.slot], content(key, BLOCK_BYTES)
            slot[:] = sent
            slot[count] ^= self.flips
            await asyncio.sleep(0)
            if self.dies_after == count or block_checksum(slot) != block_checksum(sent):
                self.store.host.abandon(ref)
                break
            landed.append((ref, block_checksum(sent)))
        return self.store.commit_fetched(Tier.REMOTE, landed)


class StoreMachine(RuleBasedStateMachine):
    seeds = st.integers(0, 2)
    lengths = st.sampled_from([LONGEST, 3, 1])

    @initialize(policy=st.sampled_from(SavePolicy))
    def start(self, policy: SavePolicy) -> None:
        self.runner = asyncio.Runner()
        self.folder = Path(tempfile.mkdtemp(prefix="store-machine-"))
        self.policy = policy
        self.lives = 0
        self.saved: dict[BlockKey, Buffer] = {}
        self.flipped: set[int] = set()
        self.files_flipped = False
        self.started = False
        self.peer: Peer
        self.open()

    def run(self, what: Coroutine[Any, Any, T]) -> T:
        """To the end of what it starts in the background: a run that depended on threads could not be repeated."""

        async def whole() -> T:
            result = await what
            if self.started:
                await self.store.settle()
            return result

        return self.runner.run(whole())

    def open(self) -> None:
        async def begin() -> None:
            self.started = True
            if self.lives:  # what was fetched of the last peer stays right, and may be on disk
                self.saved.update((key, content(key, BLOCK_BYTES)) for key in self.peer.has)
            self.lives += 1
            self.calls = FaultyCalls()
            self.disk = DiskTier(
                *(self.folder, DISK_BYTES, BLOCK_BYTES, FINGERPRINT, self.lives),
                segment_bytes=SEGMENT_BYTES,
                calls=self.calls,
            )
            memory = np.zeros((SLOTS, BLOCK_BYTES), np.uint8)
            table = memoryview(bytearray(directory_bytes(SLOTS)))
            self.directory = Directory(table, SLOTS)
            self.store = TieredStore(
                *(HostTier(SLOTS, BLOCK_BYTES), list(memory), self.disk, self.policy),
                directory=DirectoryWriter(table, SLOTS),
            )
            self.store.remote = self.peer = Peer(self.store)
            self.writer = None
            if self.store.write_behind is not None:
                self.writer = asyncio.create_task(self.store.write_behind.run())

        self.run(begin())

    async def halt(self) -> None:
        self.started = False
        await self.store.settle()
        if self.writer is not None:
            self.writer.cancel()
            await asyncio.gather(self.writer, return_exceptions=True)

    # --- what workers do ---

    @rule(seed=seeds, length=lengths, fate=st.sampled_from(["commit", "abandon", "die"]))
    def save(self, seed: int, length: int, fate: str) -> None:
        async def go() -> None:
            keys = chain(seed, length)
            refs = self.store.begin_save("w", entries(keys))
            for key, ref in zip(keys, refs, strict=True):
                if ref is not None:
                    self.store.slots[ref.slot][:] = content(key, BLOCK_BYTES)
            held = [ref for ref in refs if ref is not None]
            if fate == "die":
                self.store.host.owner_lost("w")
                self.store.host.owner_gone("w")
            elif fate == "abandon":
                self.store.abandon_save(held)
            else:
                self.store.commit_save([(ref, block_checksum(self.store.slots[ref.slot])) for ref in held])
                stored = [key for key, ref in zip(keys, refs, strict=True) if ref is not None]
                assert all(self.store.host.get(key) is not None for key in stored)
                self.saved.update((key, content(key, BLOCK_BYTES)) for key in stored)

        self.run(go())

    @rule(seed=seeds)
    def save_and_load(self, seed: int) -> None:
        self.save(seed, LONGEST, "commit")
        self.load(seed, LONGEST, True)

    @rule(seed=seeds, length=lengths, releases=st.booleans())
    def load(self, seed: int, length: int, releases: bool) -> None:
        async def go() -> None:
            keys = chain(seed, length)
            held = await self.store.lookup(keys)
            loaded = await self.store.load("w", keys, 10.0)
            for tier in set(loaded.tiers):
                event(f"loaded from {Tier(tier).label}")
            assert [block.key for block in loaded.blocks] == keys[: len(loaded.blocks)]
            assert len(loaded.tiers) == len(loaded.blocks)
            local = len(held) - held.count(Tier.REMOTE)
            on_host = next((n for n, tier in enumerate(held) if tier != Tier.HOST), local)
            assert len(loaded.blocks) >= on_host
            for block in loaded.blocks:
                copy = self.store.slots[block.ref.slot].copy()
                if block_checksum(copy) != block.checksum:
                    assert block.ref.slot in self.flipped, "the store committed bytes that it had not verified"
                    await self.store.report_corrupt([block.key])
                    break
                assert np.array_equal(copy, content(block.key, BLOCK_BYTES)), "a wrong byte was returned"
                assert block.key in self.saved or block.key in self.peer.has
            if releases:
                self.store.release(loaded.lease_id)
            else:
                self.store.host.owner_lost("w")

        self.run(go())

    @rule(seed=seeds, length=lengths)
    def read_unasked(self, seed: int, length: int) -> None:
        """As a worker reads what the directory lists: a copy with the right checksum has the right bytes."""
        keys = chain(seed, length)
        for key, slot, checksum in zip(keys, *self.directory.find(keys), strict=False):
            copy = self.store.slots[slot].copy()
            if block_checksum(copy) == checksum:
                assert np.array_equal(copy, content(key, BLOCK_BYTES)), "a wrong byte was returned"
            else:
                assert slot in self.flipped, "the directory lists bytes that were not committed"

    # --- what goes wrong ---

    @rule(torn=st.integers(0, HEADER_BYTES + BLOCK_BYTES))
    def crash(self, torn: int) -> None:
        """The process is gone in the middle of a write: nothing is sealed, and the last file has lost its end."""
        self.run(self.halt())
        self.disk._current = None  # not sealed
        self.disk.close()
        files = sorted(self.folder.glob("segment-*.kv"))
        if files:
            size = files[-1].stat().st_size
            os.truncate(files[-1], max(PAGE_BYTES, size - torn))
        self.open()

    @rule()
    def reopen(self) -> None:
        self.run(self.halt())
        kept = self.disk.keys()
        self.disk.close()
        self.open()
        assert set(self.disk.keys()) <= set(kept)
        if kept and not self.files_flipped:
            assert set(self.disk.keys()) == set(kept)
            assert self.run(self.store.lookup(kept[:1])) == bytes([Tier.DISK])

    @rule(full=st.booleans())
    def disk_full(self, full: bool) -> None:
        self.calls.full = full
        if not full:
            self.disk._write_breaker.succeeded()  # its pause is over

    @rule(where=st.sampled_from(["arena", "disk", "index"]), place=st.integers(0, 1 << 16), bit=st.integers(0, 7))
    def bitflip(self, where: str, place: int, bit: int) -> None:
        """What is drawn must not depend on how far the background has come, hence the remainders."""
        if where == "arena":
            slot, position = place % SLOTS, place // SLOTS % BLOCK_BYTES
            self.flipped.add(slot)
            self.store.slots[slot][position] ^= 1 << bit
            return
        files = sorted(self.folder.glob("*.kv" if where == "disk" else "*.idx"))
        start = PAGE_BYTES if where == "disk" else 0
        path = files[place % len(files)] if files else None
        if path is not None and (size := path.stat().st_size) > start:
            self.files_flipped = True
            with path.open("r+b") as file:
                file.seek(position := start + place % (size - start))
                old = file.read(1)[0]
                file.seek(position)
                file.write(bytes([old ^ (1 << bit)]))

    @rule(seed=seeds, length=lengths, dies_after=st.none() | st.integers(0, 3), flips=st.booleans())
    def peer_has(self, seed: int, length: int, dies_after: int | None, flips: bool) -> None:
        self.peer.has.update(chain(seed, length))
        self.peer.index.update(chain(seed, length))
        self.peer.dies_after, self.peer.flips = dies_after, flips

    @rule()
    def peer_death(self) -> None:
        """The index still knows it."""
        self.saved.update((key, content(key, BLOCK_BYTES)) for key in self.peer.has)  # what was fetched stays right
        self.peer.has.clear()

    @rule()
    def index_wipe(self) -> None:
        self.peer.index.clear()

    # --- what always holds ---

    @invariant()
    def slots_add_up(self) -> None:
        if hasattr(self, "store"):
            ledger = self.store.host.ledger(time.monotonic())
            assert ledger.sums
            assert ledger.quarantined == 0
            assert self.disk.file_bytes <= DISK_BYTES

    @invariant()
    def the_directory_lists_what_is_committed(self) -> None:
        if hasattr(self, "store"):
            for seed in range(3):
                for key in chain(seed, LONGEST):
                    block, found = self.store.host.get(key), self.directory.find([key])
                    assert found == (([], []) if block is None else ([block.ref.slot], [block.checksum]))

    @invariant()
    def the_disk_tier_can_be_reached_from_the_start_of_each_chain(self) -> None:
        if hasattr(self, "store"):
            for key in self.disk._index:
                parent = self.disk.parent(key)
                assert parent is None or parent in self.disk._index

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        try:
            self.run(self.halt())
            assert self.store.host.ledger(time.monotonic()).idle
            assert self.store.write_behind is None or self.store.write_behind.backlog_bytes == 0
        finally:
            self.disk.close()
            self.runner.close()
            shutil.rmtree(self.folder)


StoreMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=40)
TestStoreMachine = StoreMachine.TestCase
