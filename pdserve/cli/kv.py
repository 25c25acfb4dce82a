"""`pdserve kv`: does every worker's ledger sum to its pool (`audit`), and what a store node holds (the others)."""

from __future__ import annotations

import asyncio
import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pdserve.cli import kv_store
from pdserve.cli.ledger import STATES, Audit, audit
from pdserve.errors import ConfigError
from pdserve.launch.http_front import URL_HELP, get_json, router_url

_MIN_WIDTH = 120

app = typer.Typer(help="Look into the KV blocks of running workers and store nodes.", no_args_is_help=True)
kv_store.register(app)


@app.command("audit")
def audit_command(
    worker: Annotated[
        list[str] | None, typer.Option(metavar="HOST:PORT", help="A worker's admin address; may be repeated.")
    ] = None,
    url: Annotated[str | None, typer.Option(help=URL_HELP)] = None,
    redis: Annotated[str | None, typer.Option(metavar="URL", help="Find the workers here.")] = None,
    namespace: Annotated[str, typer.Option(help="Of the workers in Redis.")] = "default",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print where every block is; exit 1 if a ledger does not sum to its pool or a worker does not answer."""
    addresses = _addresses(worker or [], url, redis, namespace)
    if not addresses:
        raise ConfigError("No worker was found; name some with --worker HOST:PORT.")
    audits = [_ask(address) for address in addresses]
    if as_json:
        print(json.dumps([one.to_json() for one in audits], indent=2))
    else:
        _show(audits)
    raise typer.Exit(0 if all(one.whole for one in audits) else 1)


def _ask(address: str) -> Audit:
    try:
        return audit(address, get_json(address, "/ledger", timeout_s=10.0))
    except (OSError, ValueError) as error:
        return Audit(address, problem=f"unreachable: {error}")


def _addresses(workers: list[str], url: str | None, redis: str | None, namespace: str) -> list[str]:
    if sum(map(bool, (workers, url, redis))) > 1:
        raise ConfigError("Say where the workers are with only one of --worker, --url and --redis.")
    if workers:
        return workers
    return _from_router(router_url(url)) if redis is None else asyncio.run(_from_redis(redis, namespace))


def _from_router(url: str) -> list[str]:
    try:
        listed: Any = get_json(url, "/workers")
        # A worker that cannot be reached told no admin address: it is listed by its other one, and fails the audit.
        return [str(entry["admin_address"] or entry["address"]) for entry in listed["workers"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"The router {url} does not list its workers: {error}.") from error


async def _from_redis(redis_url: str, namespace: str) -> list[str]:
    from pdserve.discovery import RedisDiscovery

    discovery = RedisDiscovery(redis_url, namespace=namespace)
    try:
        endpoints = await discovery.poll()
    finally:
        await discovery.close()
    if endpoints is None:
        raise ConfigError(f"Redis at {redis_url} does not answer.")
    return sorted(endpoint.admin_address for endpoint in endpoints)


def _show(audits: list[Audit]) -> None:
    table = Table("worker", "blocks", *STATES, "holds", "oldest", "verdict", box=None)
    for one in audits:
        counts = [str(one.by_state.get(state, "")) for state in STATES]
        oldest = "" if one.oldest_hold_s is None else f"{one.oldest_hold_s:.1f} s"
        total = "" if one.total_blocks is None else str(one.total_blocks)
        table.add_row(one.worker, total, *counts, str(one.holds), oldest, one.problem or "sums")
    # On a narrow terminal lines wrap; numbers that are cut would be worth nothing.
    Console(width=max(Console().width, _MIN_WIDTH)).print(table)
