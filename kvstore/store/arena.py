"""The host tier's memory: one POSIX shared-memory file of equal slots, made by the node, mapped by its workers.

    slot 0 | slot 1 | ... | up to a page | directory, which the node alone maps to write

The node holds a lock on the file for as long as it lives; a file without one was left by a node that was killed, and
the next node removes it. Prompts can be read from KV: the file is 0600 and stays out of core dumps.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import secrets
from pathlib import Path

import numpy as np

from kvstore.errors import Unavailable
from kvstore.store.directory import Directory, DirectoryWriter, directory_bytes
from kvstore.transfer.transport import Buffer

SHM_FOLDER = Path("/dev/shm")
_PREFIX = "pdserve-"
_HUGE_PAGE_BYTES = 2 << 20
_MADV_POPULATE_READ = 22  # mman.h; the mmap module does not name it
_POPULATE_BYTES = 8 << 20
_KEEP_FREE = 0.05  # of the file system, for everybody else


class ArenaMap:
    """The slots of an arena file as this process sees them."""

    def __init__(self, path: Path, num_slots: int, block_bytes: int) -> None:
        """Raises OSError if the file is not there (any more) or too small."""
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            start, end = _directory_range(num_slots, block_bytes)
            if os.fstat(fd).st_size < end:  # reading behind the end would kill us
                raise OSError(errno.EINVAL, "the arena is smaller than the node said", str(path))
            memory = mmap.mmap(fd, num_slots * block_bytes)
            table = mmap.mmap(fd, end - start, prot=mmap.PROT_READ, offset=start)
        finally:
            os.close(fd)
        advise(memory)
        self.directory = Directory(memoryview(table), num_slots)
        self._memory = memory
        self.all: Buffer = np.frombuffer(memory, np.uint8)
        self.slots: list[Buffer] = list(self.all.reshape(num_slots, block_bytes))

    def populate(self) -> None:
        """Map all pages now: one by one, as they are first touched, they would cost more than the copies.

        The memory is there already, so this takes page tables only; it holds the interpreter a millisecond at a time.
        As if to read: the kernel then maps sixteen pages at once, writable ones as this is shared memory.
        """
        for start in range(0, len(self._memory), _POPULATE_BYTES):
            try:
                self._memory.madvise(_MADV_POPULATE_READ, start, min(_POPULATE_BYTES, len(self._memory) - start))
            except OSError:
                return  # before Linux 5.14: they are mapped when they are touched


def _directory_range(num_slots: int, block_bytes: int) -> tuple[int, int]:
    """Where in the file it begins and ends."""
    start = -(-num_slots * block_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    return start, start + directory_bytes(num_slots)


def advise(memory: mmap.mmap) -> None:
    """Huge pages where the system has them for shared memory; never in a core dump."""
    for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_DONTDUMP):
        with contextlib.suppress(OSError):  # a kernel without the one or the other
            memory.madvise(advice)


class Arena:
    """The node's own end: makes the file, and removes it in `close`."""

    def __init__(self, node_id: str, num_bytes: int, block_bytes: int, folder: Path = SHM_FOLDER) -> None:
        """As many whole slots as `num_bytes` hold.

        Raises:
            Unavailable: no room or no permission; one sentence that says which, and how to go on.
        """
        self.block_bytes = block_bytes
        self.num_slots = num_bytes // block_bytes
        if self.num_slots < 1:
            raise Unavailable(f"a host tier of {num_bytes} bytes holds no block of {block_bytes} bytes")
        start, end = _directory_range(self.num_slots, block_bytes)
        size = -(-end // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
        remove_orphans(folder)
        check_room(folder, size)
        self.path = folder / f"{_PREFIX}{node_id}-{secrets.token_hex(4)}"
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise Unavailable(f"the host tier needs to write to {folder}: {error.strerror}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._fd, size)
            os.posix_fallocate(self._fd, 0, size)  # now: a page that cannot be had later kills whoever touches it
            mapped = ArenaMap(self.path, self.num_slots, block_bytes)
            table = mmap.mmap(self._fd, end - start, offset=start)
        except OSError as error:
            self.close()
            raise Unavailable(f"{size} bytes of shared memory could not be had: {error.strerror}") from error
        mapped.populate()
        self.slots = mapped.slots
        self.directory = DirectoryWriter(memoryview(table), self.num_slots)

    def close(self) -> None:
        """Idempotent; workers that have it mapped keep what they see."""
        if self._fd >= 0:
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()
            os.close(self._fd)
            self._fd = -1


def check_room(folder: Path, num_bytes: int) -> None:
    """Raises Unavailable if so much shared memory is not free: writing beyond it would kill the writer by SIGBUS."""
    try:
        found = os.statvfs(folder)
    except OSError as error:
        raise Unavailable(f"the host tier needs shared memory at {folder}: {error.strerror}") from error
    free = found.f_bavail * found.f_frsize - int(found.f_blocks * found.f_frsize * _KEEP_FREE)
    if num_bytes > free:
        raise Unavailable(
            f"{folder} has room for {max(free, 0) >> 20} MiB, the host tier asks for {num_bytes >> 20} MiB:"
            f" lower --host-bytes, or give the container a larger /dev/shm (docker run --shm-size)"
        )


def remove_orphans(folder: Path) -> None:
    """Files of nodes that were killed: nobody locks them."""
    for path in folder.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, or gone meanwhile
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(fd)
