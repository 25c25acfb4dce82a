"""`python -m router`: the router process (what `pdserve router` runs)."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Annotated

import typer
import uvloop

from kvstore.control_plane import TLS_HELP
from pdserve.errors import ConfigError
from router.admission import Mode
from router.main import RouterConfig, run
from router.policy import POLICIES


def main(
    model: Annotated[Path, typer.Option(help="The model that the workers serve: a folder, a GGUF file, or ORG/NAME.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="HTTP port.")] = 8000,
    redis: Annotated[
        str | None, typer.Option(envvar="PDSERVE_REDIS_URL", help="Redis URL that workers register in.")
    ] = None,
    worker: Annotated[list[str] | None, typer.Option(help="host:port of a worker, in place of Redis.")] = None,
    namespace: Annotated[str, typer.Option(help="Separates deployments that share a Redis.")] = "default",
    policy: Annotated[str, typer.Option(help=f"How workers are chosen: {', '.join(POLICIES)}.")] = "cost",
    drain_s: Annotated[float, typer.Option(help="How long streams may go on after SIGTERM.")] = 2.0,
    admission: Annotated[
        str,
        typer.Option(
            envvar="PDSERVE_ADMISSION",
            help="Requests that are predicted to miss their class: shadow only counts them; enforce, off.",
        ),
    ] = Mode.SHADOW.value,
    skip_handoffs: Annotated[
        bool,
        typer.Option(
            envvar="PDSERVE_SKIP_HANDOFFS",
            help="Run a request on a decode worker alone when that costs less than its hand-over.",
        ),
    ] = False,
    auto_balance: Annotated[
        bool,
        typer.Option(
            envvar="PDSERVE_AUTO_BALANCE",
            help="Change workers' roles when that is predicted to raise goodput; in one router only.",
        ),
    ] = False,
    admin_key_file: Annotated[
        Path | None,
        typer.Option(
            envvar="PDSERVE_ADMIN_KEY_FILE",
            help="The admin key is in it; without one, callers on this machine are trusted.",
        ),
    ] = None,
    tenants_file: Annotated[
        Path | None,
        typer.Option(
            envvar="PDSERVE_TENANTS_FILE",
            help="Tenants, their API keys and limits (`pdserve key`); without one everybody is let in.",
        ),
    ] = None,
    tls_dir: Annotated[
        Path | None,
        typer.Option(envvar="PDSERVE_TLS_DIR", help=TLS_HELP),
    ] = None,
    decision_log: Annotated[
        Path | None, typer.Option(envvar="PDSERVE_DECISION_LOG", help="Append each decision's record to this file.")
    ] = None,
    vllm_names: Annotated[bool, typer.Option(help="Export metrics under the names of vLLM too.")] = True,
    expect: Annotated[
        str,
        typer.Option(
            envvar="PDSERVE_EXPECT",
            help="Roles of the deployment, as prefill,decode: ready when each has a worker, or has had none for 60 s.",
        ),
    ] = "",
    reuse_port: Annotated[
        bool, typer.Option(help="Several routers of this machine listen on the port, and share its connections.")
    ] = False,
    own_port: Annotated[
        int | None, typer.Option(help="Listen here too, alone: the metrics and records of this process.")
    ] = None,
) -> None:
    """Run the router until SIGTERM or Ctrl-C; a second signal ends it at once."""
    # What no line shows is not looked up for each of them: a third of what a line costs.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        config = RouterConfig(
            model=model,
            host=host,
            port=port,
            redis_url=redis,
            workers=tuple(worker or ()),
            namespace=namespace,
            policy=policy,
            drain_s=drain_s,
            admission=admission,
            skip_handoffs=skip_handoffs,
            auto_balance=auto_balance,
            admin_key_file=admin_key_file,
            tenants_file=tenants_file,
            tls_dir=tls_dir,
            decision_log=decision_log,
            vllm_names=vllm_names,
            expect=tuple(role.strip() for role in expect.split(",") if role.strip()),
            reuse_port=reuse_port,
            own_port=own_port,
        )
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run(config))
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    typer.run(main)
