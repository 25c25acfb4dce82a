"""Options become exactly the command lines of the processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdserve.errors import ConfigError
from pdserve.launch.plan import (
    UpOptions,
    counted,
    prepare_command,
    router_command,
    store_command,
    store_socket,
    worker_commands,
)

MODEL = Path("/models/tiny")


@pytest.mark.parametrize(
    ("given", "counts"),
    [((None, None, None), (1, 1, 0)), ((2, None, None), (2, 0, 0)), ((0, 0, 2), (0, 0, 2)), ((2, 1, 1), (2, 1, 1))],
)
def test_counts(given: tuple[int | None, int | None, int | None], counts: tuple[int, int, int]) -> None:
    assert counted(*given) == counts


@pytest.mark.parametrize("given", [(0, 0, 0), (0, None, None), (-1, 2, None)])
def test_impossible_counts(given: tuple[int | None, int | None, int | None]) -> None:
    with pytest.raises(ConfigError):
        counted(*given)


def option(arguments: list[str], name: str) -> str | None:
    return arguments[arguments.index(name) + 1] if name in arguments else None


def test_each_worker_has_its_role_and_name() -> None:
    commands = worker_commands(UpOptions(prefill=2, decode=1, mixed=1), MODEL, "unix:///r.sock", None)
    assert [command.name for command in commands] == ["prefill-0", "prefill-1", "decode-0", "mixed-0"]
    for command in commands:
        arguments = list(command.arguments)
        assert arguments[1:3] == ["-m", "pdserve.worker"]
        assert option(arguments, "--worker-id") == command.name
        assert option(arguments, "--role") == command.name.partition("-")[0]
        assert option(arguments, "--redis") == "unix:///r.sock"
        assert option(arguments, "--kv-bytes") is None  # the worker's own default
        assert command.announces
        assert command.environment["OMP_NUM_THREADS"] == "1"


def test_options_reach_the_processes() -> None:
    options = UpOptions(
        model=MODEL,
        port=9000,
        dtype="float32",
        threads=2,
        kv_bytes=1 << 20,
        policy="random",
        namespace="ns",
        weights="int4",
        load_format="dummy",
        worker_arguments=("--max-sequences", "4"),
    )
    worker = worker_commands(options, MODEL, "redis://h", None)[0]
    arguments = list(worker.arguments)
    assert arguments[-2:] == ["--max-sequences", "4"]
    expected = {"--dtype": "float32", "--threads": "2", "--kv-bytes": "1048576", "--namespace": "ns"}
    expected |= {"--weights": "int4", "--load-format": "dummy"}
    assert {name: option(arguments, name) for name in expected} == expected
    assert worker.environment["OMP_NUM_THREADS"] == "2"
    router = list(router_command(options, MODEL, "redis://h").arguments)
    expected = {"--port": "9000", "--policy": "random", "--namespace": "ns", "--model": str(MODEL)}
    assert {name: option(router, name) for name in expected} == expected
    assert option(router, "--expect") == "prefill,decode"
    prepare = list(prepare_command(options).arguments)
    assert (option(prepare, "--model"), option(prepare, "--weights")) == (str(MODEL), "int4")
    assert option(prepare, "--load-format") == "dummy"


def test_the_default_model_is_left_to_prepare() -> None:
    assert "--model" not in prepare_command(UpOptions()).arguments


def test_workers_are_told_the_socket_of_the_store() -> None:
    options = UpOptions(host_bytes=1 << 20, disk_bytes=1 << 30, disk_path=Path("/disk"), port=9000)
    socket = store_socket(options, Path("/run/x"))
    assert socket == Path("/run/x/store.sock")
    store = list(store_command(options, socket, "redis://h").arguments)
    assert store[1:3] == ["-m", "kvstore.store"]
    assert (option(store, "--socket"), option(store, "--redis")) == (str(socket), "redis://h")
    assert (option(store, "--host-bytes"), option(store, "--disk-bytes")) == (str(1 << 20), str(1 << 30))
    assert option(store, "--disk-path") == "/disk"
    for command in worker_commands(options, MODEL, "redis://h", socket):
        assert option(list(command.arguments), "--store") == str(socket)


def test_store_without_a_disk_tier() -> None:
    options = UpOptions(disk_bytes=0)
    store = list(store_command(options, Path("/s"), "redis://h").arguments)
    assert option(store, "--disk-bytes") is option(store, "--disk-path") is None


def test_no_host_tier_is_no_store() -> None:
    assert store_socket(UpOptions(host_bytes=0), Path("/run/x")) is None
    (worker, *_) = worker_commands(UpOptions(host_bytes=0), MODEL, "redis://h", None)
    assert option(list(worker.arguments), "--store") is None
