"""Commands that are another module: this process becomes it, arguments and `--help` included."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import typer

# Hands every argument on, options and --help included.
FORWARD: dict[str, Any] = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
}


def become(module: str, arguments: Sequence[str]) -> NoReturn:
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


def forward_to(app: typer.Typer, name: str, module: str, help_text: str) -> None:
    """Make `pdserve NAME ...` the same as `python -m MODULE ...`."""

    @app.command(name, help=help_text, **FORWARD)
    def command(context: typer.Context) -> None:
        become(module, context.args)
