"""`pdserve up`: everything on one machine."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from kvstore.sizes import parse_bytes
from pdserve.launch.plan import UpOptions, counted
from pdserve.launch.steps import Steps
from pdserve.launch.supervisor import up as start_up
from pdserve.models.source import check_model
from pdserve.models.weight_format import HELP as WEIGHTS_HELP
from pdserve.models.weight_format import LOAD_HELP, LoadFormat, WeightFormat


def register(app: typer.Typer) -> None:
    @app.command("up")
    def up(
        prefill: Annotated[int | None, typer.Option(help="Prefill workers; 1 where no count is given.")] = None,
        decode: Annotated[int | None, typer.Option(help="Decode workers; 1 where no count is given.")] = None,
        mixed: Annotated[int | None, typer.Option(help="Workers that do both.")] = None,
        model: Annotated[
            Path | None,
            typer.Option(help="A Hugging Face style folder, a GGUF file, or ORG/NAME; default: SmolLM2-135M-Instruct."),
        ] = None,
        host: Annotated[str, typer.Option(help="Where the HTTP server listens.")] = "127.0.0.1",
        port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
        dtype: Annotated[Literal["bfloat16", "float32"], typer.Option(help="Of weights and KV.")] = "bfloat16",
        threads: Annotated[int, typer.Option(min=1, help="Compute threads of each worker.")] = 1,
        kv_bytes: Annotated[
            int | None, typer.Option(parser=parse_bytes, metavar="SIZE", help="KV pool of each worker: 512M, 2G.")
        ] = None,
        kernels: Annotated[Literal["auto", "native", "reference"], typer.Option()] = "auto",
        weights: Annotated[WeightFormat, typer.Option(help=WEIGHTS_HELP)] = "dense",
        load_format: Annotated[LoadFormat, typer.Option(help=LOAD_HELP)] = "auto",
        policy: Annotated[str | None, typer.Option(help="How the router chooses workers.")] = None,
        redis: Annotated[str | None, typer.Option(metavar="URL", help="A running Redis; else one is embedded.")] = None,
        namespace: Annotated[str, typer.Option(help="Separates fleets that share a Redis.")] = "default",
        host_bytes: Annotated[str, typer.Option(help="Store: shared memory for blocks; 0: no store.")] = "1GiB",
        disk_bytes: Annotated[str, typer.Option(help="Store: disk space for blocks; 0: no disk tier.")] = "8GiB",
        disk_path: Annotated[
            Path | None, typer.Option(help="Store: folder of the disk tier; default: in the cache.")
        ] = None,
        worker_arguments: Annotated[
            list[str] | None, typer.Argument(metavar="[-- WORKER OPTIONS]", help="Further options of every worker.")
        ] = None,
    ) -> None:
        """Start prefill and decode workers, the router and a Redis on this machine; Ctrl-C ends all of it."""
        prefill_count, decode_count, mixed_count = counted(prefill, decode, mixed)
        if model is not None:
            check_model(model)
        options = UpOptions(
            prefill=prefill_count,
            decode=decode_count,
            mixed=mixed_count,
            model=model,
            host=host,
            port=port,
            dtype=dtype,
            threads=threads,
            kv_bytes=kv_bytes,
            kernels=kernels,
            weights=weights,
            load_format=load_format,
            policy=policy,
            redis_url=redis,
            namespace=namespace,
            host_bytes=parse_bytes(host_bytes),
            disk_bytes=parse_bytes(disk_bytes),
            disk_path=disk_path,
            worker_arguments=tuple(worker_arguments or ()),
        )
        raise typer.Exit(asyncio.run(start_up(options, Steps(Console(highlight=False)))))
