"""The folder of a disk tier: one node's alone, and its files by name."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from pathlib import Path

from kvstore.errors import Unavailable

_PROBE_BYTES = 4096
NO_FOLLOW = os.O_NOFOLLOW | os.O_CLOEXEC


def claim(folder: Path) -> int:
    """Make the folder ours alone; the descriptor of its lock. Raises Unavailable."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise Unavailable(f"the disk tier needs a folder of its own; {folder} is a link or another user's")
        folder.chmod(0o700)
        fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | NO_FOLLOW, 0o600)
    except OSError as error:
        raise Unavailable(f"the disk tier cannot use {folder} ({error.strerror}): name another --disk-path") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise Unavailable(f"another store node uses {folder}: give each node a --disk-path of its own") from error
    return fd


def check_writable(folder: Path, least_bytes: int) -> int:
    """Bytes that a tier may take there, those of files that it has left there included.

    A tier that has filled its disk may be had again, whatever is free by now.

    Raises:
        Unavailable: nothing can be written there, or a new tier would have room for less than `least_bytes`.
    """
    fd = claim(folder)
    probe = folder / "probe"
    try:
        own_bytes = sum(path.stat().st_size for path in segment_paths(folder))
        probe.unlink(missing_ok=True)  # of a life that ended amid this
        _try_out(probe)
        stats = os.statvfs(folder)
        free_bytes = stats.f_bavail * stats.f_frsize
    except OSError as error:
        raise Unavailable(
            f"the disk tier cannot write to {folder} ({error.strerror}): name another --disk-path"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
        os.close(fd)
    if not own_bytes and free_bytes < least_bytes:
        raise Unavailable(
            f"the disk tier has room for {free_bytes >> 20} MiB in {folder}, and one of its files takes"
            f" {least_bytes >> 20}: make room, or give it fewer --disk-bytes (0: no disk tier)"
        )
    return own_bytes + free_bytes


def _try_out(probe: Path) -> None:
    """Raises OSError if nothing can be written, for any other reason than that the disk is full."""
    try:
        probe.write_bytes(bytes(_PROBE_BYTES))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise


def segment_path(folder: Path, segment_id: int) -> Path:
    return folder / f"segment-{segment_id:016x}.kv"


def segment_paths(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(folder.glob("segment-*.kv"))


def index_path(segment: Path) -> Path:
    return segment.with_suffix(".idx")


def segment_id_of(path: Path) -> int:
    """0 of what is no segment's name."""
    try:
        return int(path.stem.removeprefix("segment-"), 16)
    except ValueError:
        return 0


def remove_segment(path: Path) -> None:
    """With its side index. Idempotent."""
    for one in (path, index_path(path)):
        with contextlib.suppress(OSError):
            one.unlink()
