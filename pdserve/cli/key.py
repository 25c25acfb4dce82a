"""`pdserve key TENANT`: a new API key."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from pdserve.tenants import add_key

_DAY_S = 86_400


def register(app: typer.Typer) -> None:
    @app.command("key")
    def key(
        tenant: Annotated[str, typer.Argument(help="Its name; one that is new is added.")],
        file: Annotated[
            Path, typer.Option(envvar="PDSERVE_TENANTS_FILE", help="The tenants' file of the routers; made if need be.")
        ],
        days: Annotated[
            int | None, typer.Option(min=1, max=36_500, help="How long it is valid; else until removed.")
        ] = None,
    ) -> None:
        """Print a new API key of a tenant, and add its digest to the tenants' file, which running routers follow."""
        print(add_key(file, tenant, expires_s=time.time() + days * _DAY_S if days is not None else None))
