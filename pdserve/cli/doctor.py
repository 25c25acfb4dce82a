"""`pdserve doctor`: what is installed, what is missing, how to get it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from pdserve.launch.checks import Check, can_serve, run_checks


def register(app: typer.Typer) -> None:
    @app.command("doctor")
    def doctor(
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
        port: Annotated[int, typer.Option(min=1, max=65535, help="The HTTP port to look at.")] = 8000,
    ) -> None:
        """Look at everything that serving needs; exit 0 if this machine can serve."""
        checks = run_checks(port)
        if as_json:
            print(json.dumps({"can_serve": can_serve(checks), "checks": [asdict(check) for check in checks]}, indent=2))
        else:
            show(checks, Console(highlight=False))
        raise typer.Exit(0 if can_serve(checks) else 1)


def show(checks: Sequence[Check], console: Console) -> None:
    """A line a check; what is missing is red if it is needed, else yellow."""
    for check in checks:
        style = "green" if check.ok else "red" if check.needed else "yellow"
        detail = check.detail if check.ok else f"{check.detail}: {check.remedy}"
        line = Text.assemble((f"{'ok' if check.ok else 'missing':<8}", style), f"{check.name:<10} {detail}")
        console.print(line, soft_wrap=True)
    lacking = ", ".join(check.name for check in checks if check.needed and not check.ok)
    console.print(f"cannot serve, needs: {lacking}" if lacking else "can serve", style="bold")
