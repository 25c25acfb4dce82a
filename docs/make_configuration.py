"""Writes docs/configuration.md from the commands' own options; `--check` says whether it is fresh."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperArgument, TyperGroup, TyperOption

from pdserve import cli

TARGET = Path(__file__).parent / "configuration.md"
HEAD = """# Configuration

Every option of every command, generated from the code (`make docs`). A process is configured by its command line; where
a variable is named, the environment does as well. `pdserve up` starts all of these processes on one machine and hands
what stands behind `--` to each worker. On Kubernetes, the chart's values ([its README](../helm/pdserve/README.md))
become these options. What a client may ask for is in [api.md](api.md), limits and time-outs in
[operate.md](operate.md).
"""
# Commands that are processes of their own, which `pdserve` becomes.
PROCESSES = {"worker": "pdserve.worker.__main__", "router": "router.__main__", "store": "kvstore.store.__main__"}


def commands() -> Iterator[tuple[str, Any]]:
    """By name, as they are typed."""
    group = typer.main.get_command(cli.app)
    assert isinstance(group, TyperGroup)
    for name, command in group.commands.items():
        if name in PROCESSES:
            process = typer.Typer(add_completion=False)
            process.command()(importlib.import_module(PROCESSES[name]).main)
            yield name, typer.main.get_command(process)
        elif isinstance(command, TyperGroup):
            for below, each in command.commands.items():
                yield f"{name} {below}", each
        else:
            yield name, command


def rows(command: Any) -> Iterator[str]:
    for parameter in command.params:
        if parameter.name == "help" or getattr(parameter, "hidden", False):
            continue
        names = (parameter.metavar or parameter.name.upper(),)
        if isinstance(parameter, TyperOption):
            names = (*parameter.opts, *parameter.secondary_opts)
        assert isinstance(parameter, TyperOption | TyperArgument)
        default = getattr(parameter.default, "value", parameter.default)  # of an enumeration
        shown = "" if default in (None, "", (), []) or callable(default) else f"`{default}`"
        text = " ".join((parameter.help or "").split())
        if parameter.envvar:
            text += f" Variable: `{parameter.envvar}`."
        named = ", ".join(f"`{name}`" for name in names)
        yield f"| {named} | {'required' if parameter.required else shown} | {text} |"


def render() -> str:
    parts = [HEAD]
    for name, command in commands():
        text = inspect.cleandoc(command.help or "").split("\n\n")[0].replace("\n", " ")
        parts.append(f"\n## pdserve {name}\n\n{text}\n")
        found = list(rows(command))
        if found:
            parts.append("\n| option | default | |\n|---|---|---|\n" + "\n".join(found) + "\n")
    return "".join(parts)


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(0 if TARGET.read_text() == render() else "docs/configuration.md is stale: run make docs")
    TARGET.write_text(render())
