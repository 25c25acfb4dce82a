"""`pdserve router`: the front door. It is not imported: nothing in pdserve knows the router."""

from __future__ import annotations

import typer

from pdserve.cli.forward import forward_to


def register(app: typer.Typer) -> None:
    forward_to(app, "router", "router", "Run the router: --model DIR --port P --redis URL | --worker HOST:PORT ...")
