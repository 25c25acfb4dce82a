"""`pdserve models`: which models can be served."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from pdserve.models.supported import supported


def register(app: typer.Typer) -> None:
    @app.command("models")
    def models(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
        """List the families, rotations, files and limits that are supported."""
        listed = supported()
        if as_json:
            print(json.dumps(listed, indent=2))
            return
        for section, entries in listed.items():
            print(section)
            width = max(map(len, entries))
            for name, text in entries.items():
                print(f"  {name:<{width}}  {text}".rstrip())
