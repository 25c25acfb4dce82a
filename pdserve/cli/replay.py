"""`pdserve replay`: what a policy would have done with a trace. It is not imported: no module here knows the router."""

from __future__ import annotations

import typer

from pdserve.cli.forward import forward_to


def register(app: typer.Typer) -> None:
    forward_to(
        app, "replay", "router.replay", "Replay a trace through routing policies: TRACE --policy a,b,c --workers N"
    )
