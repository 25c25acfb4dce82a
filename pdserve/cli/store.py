"""`pdserve store`: one store node."""

from __future__ import annotations

import typer

from pdserve.cli.forward import forward_to


def register(app: typer.Typer) -> None:
    text = "Run a store node: --host-bytes 4GiB --disk-bytes 20GiB --disk-path DIR ..."
    forward_to(app, "store", "kvstore.store", text)
