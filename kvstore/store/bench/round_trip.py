"""What a message to another process of this machine and its answer cost at least: plain sockets that block."""

from __future__ import annotations

import socket
import statistics
import subprocess
import sys
import time

_ROUNDS = 2000
_MESSAGE = bytes(64)


def round_trip_us() -> float:
    """Median over a Unix socket, with a child that echoes."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "kvstore.store.bench.round_trip", str(theirs.fileno())]
    child = subprocess.Popen(command, pass_fds=(theirs.fileno(),))
    theirs.close()
    times_s = []
    with ours:
        for _ in range(_ROUNDS):
            began_s = time.perf_counter()
            ours.sendall(_MESSAGE)
            ours.recv(len(_MESSAGE))
            times_s.append(time.perf_counter() - began_s)
    child.wait()
    return 1e6 * statistics.median(times_s[_ROUNDS // 10 :])


def _echo(fd: int) -> None:
    with socket.socket(fileno=fd) as connected:
        while data := connected.recv(len(_MESSAGE)):
            connected.sendall(data)


if __name__ == "__main__":
    _echo(int(sys.argv[1]))
