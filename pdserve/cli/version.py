"""`pdserve version`."""

from __future__ import annotations

import typer

import pdserve


def register(app: typer.Typer) -> None:
    @app.command("version")
    def version() -> None:
        """Print the version."""
        print(pdserve.__version__)
