"""`python -m pdserve.worker`: one worker process (what `pdserve worker` runs)."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
import uvloop

from kvstore.control_plane import TLS_HELP, control_plane
from kvstore.errors import KvError
from kvstore.layout import KvDtype
from kvstore.sizes import parse_bytes
from pdserve.errors import ConfigError
from pdserve.launch.announce import Announcer
from pdserve.launch.folders import cache_folder
from pdserve.models.source import resolve_model
from pdserve.models.weight_format import HELP as WEIGHTS_HELP
from pdserve.models.weight_format import LOAD_HELP, LoadFormat, WeightFormat
from pdserve.worker.config import Role, TransportName, WorkerConfig

# A thread that waits for the interpreter lock gets it this soon: asyncio must not hold up a step for the default 5 ms.
_SWITCH_INTERVAL_S = 0.0005


def main(
    model: Annotated[Path, typer.Option(help="A Hugging Face style folder, a GGUF file, or ORG/NAME.")],
    role: Annotated[Role, typer.Option(help="What the router prefers this worker for.")] = Role.MIXED,
    worker_id: Annotated[str, typer.Option(help="Unique name; default: role and process id.")] = "",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="gRPC port; 0 chooses a free one.")] = 0,
    admin_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of health, metrics and ledger; 0 chooses a free one.")
    ] = 0,
    redis: Annotated[
        str | None,
        typer.Option(envvar="PDSERVE_REDIS_URL", help="Redis URL to be found through; none: routers name us."),
    ] = None,
    namespace: Annotated[str, typer.Option(help="Separates deployments that share a Redis.")] = "default",
    device: Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[Literal["bfloat16", "float32"], typer.Option(help="Of weights and KV.")] = "bfloat16",
    kv_dtype: Annotated[
        KvDtype | None, typer.Option(help="Of KV, if other than dtype; fp8_e4m3 on a GPU with FlashInfer.")
    ] = None,
    kv_bytes: Annotated[
        int | None,
        typer.Option(
            parser=parse_bytes,
            metavar="SIZE",
            help="Memory of the KV pool, such as 512M; default 1 GiB, or what the next leaves on a GPU.",
        ),
    ] = None,
    gpu_memory_utilization: Annotated[
        float, typer.Option(min=0.05, max=1.0, help="Share of a GPU's memory that this worker may take.")
    ] = 0.9,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens a KV block.")] = 16,
    max_batched_tokens: Annotated[int, typer.Option(min=1, help="Tokens computed in one step.")] = 512,
    speculate_tokens: Annotated[
        int,
        typer.Option(min=0, help="Tokens of a draft by prompt look-up that a decode step checks; 0 drafts nothing."),
    ] = 0,
    max_sequences: Annotated[int, typer.Option(min=1, help="Sequences running at once.")] = 64,
    max_model_len: Annotated[
        int, typer.Option(min=0, help="Tokens a request may have; 0: what model and pool allow.")
    ] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Compute threads.")] = 1,
    kernels: Annotated[str, typer.Option(help="auto, native, flashinfer, sdpa or reference.")] = "auto",
    weights: Annotated[WeightFormat, typer.Option(help=WEIGHTS_HELP)] = "dense",
    load_format: Annotated[LoadFormat, typer.Option(help=LOAD_HELP)] = "auto",
    transport: Annotated[
        TransportName, typer.Option(help="What moves blocks to other workers; nixl: straight between GPUs.")
    ] = "ucx",
    store: Annotated[Path | None, typer.Option(help="Socket of this machine's store node (pdserve store).")] = None,
    tls_dir: Annotated[
        Path | None,
        typer.Option(envvar="PDSERVE_TLS_DIR", help=TLS_HELP),
    ] = None,
    vllm_names: Annotated[bool, typer.Option(help="Export metrics under the names of vLLM too.")] = True,
    ready_fd: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run one worker until SIGTERM or Ctrl-C."""
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    announcer = Announcer(ready_fd)
    try:
        config = WorkerConfig(
            role=role,
            worker_id=worker_id or f"{role.value}-{os.getpid()}",
            model=resolve_model(model, cache_folder()),
            host=host,
            port=port,
            admin_port=admin_port,
            redis_url=redis,
            namespace=namespace,
            device=device,
            dtype=dtype,
            kv_dtype=kv_dtype,
            kv_bytes=kv_bytes,
            gpu_memory_utilization=gpu_memory_utilization,
            block_size=block_size,
            max_batched_tokens=max_batched_tokens,
            speculate_tokens=speculate_tokens,
            max_sequences=max_sequences,
            max_model_len=max_model_len or None,
            threads=threads,
            kernels=kernels,
            weights=weights,
            load_format=load_format,
            vllm_names=vllm_names,
            transport=transport,
            store=store,
            control=control_plane(tls_dir),
        )
        # Imported here, so that a wrong option is told at once and torch sees the environment set above.
        from pdserve.worker.build import build_engine
        from pdserve.worker.engine_thread import end_process_in_a_step
        from pdserve.worker.process import run

        built = build_engine(config, announcer.progress)
        uvloop.run(
            run(
                config,
                built,
                lambda hello: announcer.ready(
                    worker_id=hello.worker_id, address=hello.address, admin_address=hello.admin_address
                ),
            )
        )
    except (ConfigError, KvError) as error:
        announcer.error(str(error))
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    end_process_in_a_step()


if __name__ == "__main__":
    typer.run(main)
