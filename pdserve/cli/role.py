"""`pdserve role WORKER ROLE`: another role for a worker that runs, without a restart and without losing a request."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from pdserve.errors import ConfigError
from pdserve.launch.http_front import URL_HELP, get_json, post_json, router_url

_TIMEOUT_S = 10.0
_GRACE_S = 15.0  # after the drain: what moves blocks is ended by its own deadlines
_LOOK_S = 0.2


def register(app: typer.Typer) -> None:
    @app.command("role")
    def role(
        worker: Annotated[str, typer.Argument(metavar="WORKER", help="Its id, as GET /v1/topology shows it.")],
        role: Annotated[str, typer.Argument(metavar="ROLE", help="prefill, decode or mixed.")],
        url: Annotated[str | None, typer.Option(help=URL_HELP)] = None,
        admin_key_file: Annotated[
            Path | None,
            typer.Option(envvar="PDSERVE_ADMIN_KEY_FILE", help="The router's admin key, if it has one."),
        ] = None,
        drain_s: Annotated[float, typer.Option(help="What runs may finish so long; then it moves.")] = 30.0,
        force: Annotated[bool, typer.Option(help="Even the last worker of its role.")] = False,
        wait: Annotated[bool, typer.Option(help="Return when the worker has the role.")] = True,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ) -> None:
        """Drain a worker and change its role."""
        headers = {"x-pdserve-admin-key": _key(admin_key_file)} if admin_key_file is not None else {}
        body = {"role": role, "drain_s": drain_s, "force": force}
        router = router_url(url)
        try:
            found = post_json(router, f"/admin/workers/{quote(worker, safe='')}/role", body, headers, _TIMEOUT_S)
            if wait and found["next_role"] is not None:
                found = _wait(router, headers, worker, role, drain_s + _GRACE_S)
        except OSError as error:
            raise ConfigError(f"The router {router} does not answer: {error}.") from error
        except ValueError as error:
            raise ConfigError(str(error)) from error
        after = f", becomes {found['next_role']}" if found["next_role"] is not None else ""
        print(json.dumps(found) if as_json else f"{worker}: {found['role']}{after}")


def _key(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError as error:
        raise ConfigError(f"The admin key cannot be read from {file} ({error.strerror}).") from error


def _wait(url: str, headers: Mapping[str, str], worker: str, role: str, within_s: float) -> dict[str, Any]:
    """Until the topology shows the role. Raises ConfigError."""
    until_s = time.monotonic() + within_s
    while time.monotonic() < until_s:
        for entry in get_json(url, "/v1/topology", headers=headers)["workers"]:
            if entry["worker_id"] == worker and entry["role"] == role and entry["next_role"] is None:
                return dict(entry)
        time.sleep(_LOOK_S)
    raise ConfigError(f"{worker} has not become a {role} worker within {within_s:g} s; GET /v1/topology shows it.")
