"""What `pdserve up` runs: from options to the command lines of the processes. Pure."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvstore.layout import KvDtype
from pdserve.errors import ConfigError
from pdserve.launch.child import Command
from pdserve.launch.folders import cache_folder
from pdserve.models.weight_format import LoadFormat, WeightFormat

ROLES = ("prefill", "decode", "mixed")

_GPU_SHARE = 0.9  # of all workers together, as of one by default


@dataclass(frozen=True, slots=True)
class UpOptions:
    """The options of `pdserve up`; None leaves the choice to the process that the option is for."""

    prefill: int = 1
    decode: int = 1
    mixed: int = 0
    model: Path | None = None  # None: the default model, fetched where it is missing
    host: str = "127.0.0.1"
    port: int = 8000
    dtype: KvDtype = "bfloat16"
    threads: int = 1
    kv_bytes: int | None = None
    kernels: str = "auto"
    weights: WeightFormat = "dense"
    load_format: LoadFormat = "auto"
    policy: str | None = None
    redis_url: str | None = None  # None: an embedded server
    namespace: str = "default"
    host_bytes: int = 1 << 30  # of the store's tiers; 0: without
    disk_bytes: int = 8 << 30
    disk_path: Path | None = None  # None: in the cache, for this namespace and port
    worker_arguments: Sequence[str] = ()


def counted(prefill: int | None, decode: int | None, mixed: int | None) -> tuple[int, int, int]:
    """Workers by role; one prefill and one decode worker where no count is given.

    Raises:
        ConfigError: a count is negative, or there is no worker at all.
    """
    if prefill is None and decode is None and mixed is None:
        return (1, 1, 0)
    counts = (prefill or 0, decode or 0, mixed or 0)
    if min(counts) < 0:
        raise ConfigError("The numbers of workers cannot be negative.")
    if sum(counts) == 0:
        raise ConfigError("At least one worker is needed: --prefill N, --decode M or --mixed K.")
    return counts


def prepare_command(options: UpOptions) -> Command:
    values = {"--dtype": options.dtype, "--kernels": options.kernels}
    values |= {"--weights": options.weights, "--load-format": options.load_format}
    arguments = _module("pdserve.launch.prepare", values)
    if options.model is not None:
        arguments += ["--model", str(options.model)]
    return Command("prepare", arguments, _compute_environment(options.threads), announces=True)


def store_socket(options: UpOptions, folder: Path) -> Path | None:
    """Where the store node listens; None if all its tiers are switched off."""
    return folder / "store.sock" if options.host_bytes else None


def store_command(options: UpOptions, socket: Path, redis_url: str) -> Command:
    values = {
        "--socket": str(socket),
        "--host-bytes": str(options.host_bytes),
        "--redis": redis_url,
        "--namespace": options.namespace,
        "--node-id": "store-0",
    }
    if options.disk_bytes:
        path = options.disk_path or cache_folder() / "store" / f"{options.namespace}-{options.port}"
        values |= {"--disk-bytes": str(options.disk_bytes), "--disk-path": str(path)}
    return Command("store", _module("kvstore.store", values), {"UCX_WARN_UNUSED_ENV_VARS": "n"}, announces=True)


def worker_commands(options: UpOptions, model: Path, redis_url: str, store: Path | None) -> list[Command]:
    """One command a worker, named `role-number`, which is also its worker id. `store` is its node's socket."""
    return [
        _worker_command(options, model, redis_url, store, role, f"{role}-{number}")
        for role, count in _counts(options)
        for number in range(count)
    ]


def _counts(options: UpOptions) -> list[tuple[str, int]]:
    """Workers of each role."""
    return list(zip(ROLES, (options.prefill, options.decode, options.mixed), strict=True))


def _worker_command(
    options: UpOptions, model: Path, redis_url: str, store: Path | None, role: str, worker_id: str
) -> Command:
    values = {
        "--role": role,
        "--worker-id": worker_id,
        "--model": str(model),
        "--redis": redis_url,
        "--namespace": options.namespace,
        "--dtype": options.dtype,
        "--threads": str(options.threads),
        "--kernels": options.kernels,
        "--weights": options.weights,
        "--load-format": options.load_format,
    }
    workers = options.prefill + options.decode + options.mixed
    if workers > 1:  # which share one GPU, where there is one
        values["--gpu-memory-utilization"] = f"{_GPU_SHARE / workers:.3f}"
    if store is not None:
        values["--store"] = str(store)
    if options.kv_bytes is not None:
        values["--kv-bytes"] = str(options.kv_bytes)
    arguments = [*_module("pdserve.worker", values), *options.worker_arguments]
    return Command(worker_id, arguments, _compute_environment(options.threads), announces=True)


def router_command(options: UpOptions, model: Path, redis_url: str) -> Command:
    values = {
        "--host": options.host,
        "--port": str(options.port),
        "--model": str(model),
        "--redis": redis_url,
        "--namespace": options.namespace,
        # The workers end with it, so there is nothing that its streams could wait for.
        "--drain-s": "0",
        "--expect": ",".join(role for role, count in _counts(options) if count),
    }
    if options.policy is not None:
        values["--policy"] = options.policy
    return Command("router", _module("router", values), {}, announces=False)


def _module(name: str, values: dict[str, str]) -> list[str]:
    return [sys.executable, "-m", name, *(part for pair in values.items() for part in pair)]


def _compute_environment(threads: int) -> dict[str, str]:
    """More OpenMP threads than free cores stall badly, and spinning ones take the core from the other processes."""
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "UCX_WARN_UNUSED_ENV_VARS": "n"}
