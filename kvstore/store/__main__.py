"""`python -m kvstore.store`: one store node (what `pdserve store` runs)."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import tempfile
from pathlib import Path
from typing import Annotated

import typer
import uvloop

from kvstore.control_plane import TLS_HELP, control_plane
from kvstore.errors import KvError
from kvstore.sizes import parse_bytes
from kvstore.store.config import SavePolicy, StoreConfig
from kvstore.store.geometry import Geometry
from kvstore.store.node import NodeInfo, run


def main(
    host_bytes: Annotated[str, typer.Option(help="Shared memory for blocks, such as 4GiB; 0: no host tier.")] = "4GiB",
    disk_bytes: Annotated[str, typer.Option(help="Disk space for blocks; 0: no disk tier.")] = "0",
    disk_path: Annotated[Path | None, typer.Option(help="Folder of the disk tier, for this node alone.")] = None,
    socket_path: Annotated[
        Path | None, typer.Option("--socket", help="Unix socket for this machine's workers; default: a private one.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address that other nodes reach us at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="gRPC port for other nodes; 0 chooses a free one.")] = 0,
    admin_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of health, metrics and ledger; 0 chooses a free one.")
    ] = 0,
    redis: Annotated[
        str | None, typer.Option(envvar="PDSERVE_REDIS_URL", help="Redis URL of the index; none: no remote tier.")
    ] = None,
    namespace: Annotated[str, typer.Option(help="Separates deployments that share a Redis.")] = "default",
    node_id: Annotated[str, typer.Option(help="Unique name; default: machine and process id.")] = "",
    policy: Annotated[SavePolicy, typer.Option(help="Which blocks go to disk.")] = SavePolicy.SECOND_TOUCH,
    tenant_bytes: Annotated[str, typer.Option(help="What one tenant may hold in a tier; 0: no cap.")] = "0",
    tls_dir: Annotated[
        Path | None,
        typer.Option(envvar="PDSERVE_TLS_DIR", help=TLS_HELP),
    ] = None,
    fingerprint: Annotated[str, typer.Option(help="Hex; with --block-bytes: open before a worker attaches.")] = "",
    block_bytes: Annotated[int, typer.Option(help="Bytes of one block; the first worker tells.")] = 0,
    ready_fd: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run one store node until SIGTERM or Ctrl-C."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    name = node_id or f"{socket.gethostname()}-{os.getpid()}"
    if not re.fullmatch(r"[\w.-]{1,64}", name):
        raise typer.BadParameter("--node-id takes 1 to 64 letters, digits, dots and dashes")
    try:
        control = control_plane(tls_dir)
    except KvError as error:
        raise typer.BadParameter(str(error)) from error
    config = StoreConfig(
        node_id=name,
        socket_path=socket_path or Path(tempfile.gettempdir()) / f"pdserve-store-{os.getuid()}" / "store.sock",
        host_bytes=parse_bytes(host_bytes),
        disk_bytes=parse_bytes(disk_bytes),
        disk_path=disk_path,
        host=host,
        port=port,
        admin_port=admin_port,
        redis_url=redis,
        namespace=namespace,
        policy=policy,
        tenant_bytes=parse_bytes(tenant_bytes),
        control=control,
    )
    if config.disk_bytes and disk_path is None:
        raise typer.BadParameter("--disk-bytes needs --disk-path")
    try:
        geometry = Geometry(bytes.fromhex(fingerprint), block_bytes) if fingerprint else None
        uvloop.run(run(config, geometry, lambda info: _announce(ready_fd, _ready(info))))
    except (KvError, ValueError) as error:
        _announce(ready_fd, {"error": str(error)})
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


def _ready(info: NodeInfo) -> dict[str, object]:
    return {
        "ready": True,
        "node_id": info.node_id,
        "socket": str(info.socket_path),
        "address": info.address,
        "admin_address": info.admin_address,
    }


def _announce(ready_fd: int | None, value: dict[str, object]) -> None:
    """One JSON line to whoever started us, as all processes of pdserve do; this package must not import its code."""
    if ready_fd is not None:
        with os.fdopen(ready_fd, "w") as pipe:
            pipe.write(json.dumps(value) + "\n")


if __name__ == "__main__":
    typer.run(main)
