"""The command `pdserve`: one file a command. What is heavy (torch, UCX) runs in processes of its own."""

from __future__ import annotations

import sys

import typer

from pdserve.cli import bench, chat, doctor, explain, key, kv, models, replay, role, router, store, up, version, worker
from pdserve.errors import ConfigError

app = typer.Typer(
    name="pdserve",
    help="Serve large language models with prefill and decode on separate workers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _command in (up, worker, router, store, chat, explain, key, role, replay, models, doctor, bench, version):
    _command.register(app)
app.add_typer(kv.app, name="kv")


def main() -> None:
    """Ends the process; code 1 with one sentence for what the user can mend."""
    try:
        app()
    except ConfigError as error:
        print(f"pdserve: {error}", file=sys.stderr)
        sys.exit(1)
