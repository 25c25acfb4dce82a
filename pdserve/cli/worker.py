"""`pdserve worker`: one worker process."""

from __future__ import annotations

import typer

from pdserve.cli.forward import forward_to


def register(app: typer.Typer) -> None:
    forward_to(app, "worker", "pdserve.worker", "Run one worker: --role prefill|decode|mixed --model DIR ...")
