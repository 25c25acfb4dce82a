"""`pdserve store`: the name of the store node, which this version does not have."""

from __future__ import annotations

import sys

import typer

from pdserve.cli.forward import FORWARD


def register(app: typer.Typer) -> None:
    @app.command("store", help="Run a store node (not in this version).", **FORWARD)
    def store() -> None:
        print("pdserve: this version has no store node yet; workers keep blocks in their own pools.", file=sys.stderr)
        raise typer.Exit(2)
