"""How processes of a deployment reach each other by gRPC: in the clear, or with TLS on both sides.

With TLS every process has a certificate of one authority, and both ends of a connection check the other's. A
certificate is for the deployment's name, not for an address: workers come and go on any. `PEER_NAME` is that name.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import grpc
import grpc.aio

from kvstore.errors import Unavailable

PEER_NAME = "pdserve"
TLS_HELP = "tls.crt, tls.key, ca.crt: TLS on both sides between processes."  # of the option that names the folder
Options = Sequence[tuple[str, Any]]
# A peer that is silent for 4 s during a call is gone.
KEEPALIVE: Options = (
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.http2.max_pings_without_data", 0),
)


class ControlPlane(Protocol):
    def channel(self, address: str, options: Options) -> grpc.aio.Channel:
        """A client's channel to host:port; dials when it is used."""
        ...

    def listen(self, server: grpc.aio.Server, address: str) -> int:
        """The port of `server`, which is not started yet. Raises RuntimeError if it cannot be had."""
        ...


class InTheClear:
    def channel(self, address: str, options: Options) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(address, options=options)

    def listen(self, server: grpc.aio.Server, address: str) -> int:
        return server.add_insecure_port(address)


class MutualTls:
    """From a folder with `tls.crt`, `tls.key` and `ca.crt`, as cert-manager writes it.

    The files are read again for each connection that is made or accepted, so renewed certificates need no restart.
    """

    def __init__(self, folder: Path) -> None:
        """Raises Unavailable if they cannot be used."""
        self._folder = folder
        self._read()
        mode = (folder / "tls.key").stat().st_mode
        if mode & stat.S_IRWXO:
            raise Unavailable(f"{folder}/tls.key can be read by everybody: chmod 600 it")

    def channel(self, address: str, options: Options) -> grpc.aio.Channel:
        key, certificate, authority = self._read()
        credentials = grpc.ssl_channel_credentials(authority, key, certificate)
        return grpc.aio.secure_channel(
            address, credentials, options=[*options, ("grpc.ssl_target_name_override", PEER_NAME)]
        )

    def listen(self, server: grpc.aio.Server, address: str) -> int:
        first = self._server_configuration()
        credentials = grpc.dynamic_ssl_server_credentials(
            first, self._server_configuration, require_client_authentication=True
        )
        return server.add_secure_port(address, credentials)

    def _server_configuration(self) -> Any:
        key, certificate, authority = self._read()
        return grpc.ssl_server_certificate_configuration([(key, certificate)], root_certificates=authority)

    def _read(self) -> tuple[bytes, bytes, bytes]:
        """Key, certificate chain, authority; PEM."""
        try:
            key, certificate, authority = (
                (self._folder / name).read_bytes() for name in ("tls.key", "tls.crt", "ca.crt")
            )
        except OSError as error:
            raise Unavailable(f"{error.filename} cannot be read ({error.strerror})") from error
        return key, certificate, authority


IN_THE_CLEAR = InTheClear()


def control_plane(tls_folder: Path | None) -> ControlPlane:
    """Raises Unavailable."""
    return MutualTls(tls_folder) if tls_folder is not None else IN_THE_CLEAR
