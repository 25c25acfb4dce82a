"""Worker processes forked from one that has imported all that a worker does: that is most of what a start takes.

They have its imports and hash seed in common and do not end as an interpreter does: where that matters, a test starts
`python -m pdserve.worker` itself (`Stack.fresh`). UCX, threads and weights come after the fork.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["pdserve.worker.__main__", "pdserve.worker.build", "pdserve.worker.process"])


class ForkedWorker:
    """Of `subprocess.Popen` what the tests use."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        """`arguments`: of `python -m pdserve.worker`, without `--ready-fd`."""
        reader, writer = _SERVER.Pipe(duplex=False)
        with writer:
            self._process = _SERVER.Process(target=_run, args=(list(arguments), log, writer), daemon=True)
            self._process.start()
        with reader:
            self.ready_fd = os.dup(reader.fileno())  # to read the ready line from; the caller closes it
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired("pdserve.worker", timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(arguments: list[str], log: Path, ready: Connection) -> None:
    import typer

    from pdserve.worker.__main__ import main

    with log.open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.argv = ["pdserve.worker", *arguments, "--ready-fd", str(os.dup(ready.fileno()))]
    ready.close()
    typer.run(main)
