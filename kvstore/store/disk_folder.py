"""The folder of a disk tier: one node's alone, and its files by name."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from pathlib import Path

from kvstore.errors import Unavailable

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
        raise Unavailable(f"the disk tier cannot use {folder}: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise Unavailable(f"another store node uses {folder}: give each node a --disk-path of its own") from error
    return fd


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
