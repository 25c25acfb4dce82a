"""Where files go: the cache, which is kept, and the run folder, which ends with the process that made it."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

from pdserve.errors import ConfigError

RUN_PREFIX = "pdserve-"
_LOCK = "lock"
# sun_path holds 108 bytes; sockets in a run folder have names of at most 20.
_MAX_RUN_FOLDER_BYTES = 80


def cache_folder() -> Path:
    """`$PDSERVE_CACHE`, else `~/.cache/pdserve`; not necessarily there yet."""
    chosen = os.environ.get("PDSERVE_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "pdserve"


def runtime_folder() -> Path:
    """`$XDG_RUNTIME_DIR` where it can be used, else `/tmp`."""
    chosen = os.environ.get("XDG_RUNTIME_DIR", "")
    usable = os.path.isdir(chosen) and os.access(chosen, os.W_OK) and len(os.fsencode(chosen)) < _MAX_RUN_FOLDER_BYTES
    return Path(chosen) if usable else Path("/tmp")


class RunFolder:
    """A private folder for sockets and logs, gone on exit. Use as a context manager.

    It is locked while it is used. Entering also removes folders that are not: their process was killed.

    Raises:
        ConfigError: on entering, the folder cannot be made.
    """

    def __init__(self, parent: Path) -> None:
        self._parent = parent
        self._lock: int | None = None

    def __enter__(self) -> Path:
        remove_stale(self._parent)
        try:
            self.path = Path(tempfile.mkdtemp(prefix=RUN_PREFIX, dir=self._parent))
            self._lock = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        except OSError as error:
            raise ConfigError(f"No run folder can be made in {self._parent}: {error.strerror}.") from error
        if not (self.path / _LOCK).exists():  # another start took it for a stale one before it was locked
            os.close(self._lock)
            return self.__enter__()
        return self.path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)


def remove_stale(parent: Path) -> None:
    """Remove run folders of this user whose process is gone."""
    for path in parent.glob(f"{RUN_PREFIX}*/{_LOCK}"):
        try:
            if path.stat().st_uid != os.getuid():
                continue
            lock = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue  # someone else removes it
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.parent, ignore_errors=True)
        except BlockingIOError:
            pass  # in use
        finally:
            os.close(lock)
