"""A real Redis-compatible server on a Unix socket for tests, which they may kill, freeze and empty."""

from __future__ import annotations

import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from pdserve.launch.redis_server import SOCKET, server_binary, server_command, server_url

_DEADLINE_S = 20.0


@dataclass(frozen=True, slots=True)
class RedisProcess:
    process: subprocess.Popen[bytes]
    url: str
    path: Path

    def call(self, command: bytes) -> bytes:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_DEADLINE_S)
            connection.connect(str(self.path))
            connection.sendall(command + b"\r\n")
            return connection.recv(4096)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def start_redis(folder: Path) -> RedisProcess:
    command = server_command(server_binary(), folder)
    process = subprocess.Popen(command.arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    server = RedisProcess(process, server_url(folder), folder / SOCKET)
    end_s = time.monotonic() + _DEADLINE_S
    while True:
        try:
            if server.call(b"PING").startswith(b"+PONG"):
                return server
        except OSError:
            if time.monotonic() > end_s:
                raise
            time.sleep(0.02)
