"""What a worker is told on its command line is refused where it could only fail later."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from pdserve.errors import ConfigError
from pdserve.worker.__main__ import main
from pdserve.worker.config import Role, WorkerConfig


@pytest.mark.parametrize("worker_id", ["a/b", "", "a b", "é", "x" * 254, 'a"', "a\r\nb"])
def test_an_id_that_no_path_or_header_can_bear(worker_id: str) -> None:
    with pytest.raises(ConfigError, match="--worker-id takes 1 to 253 letters"):
        WorkerConfig(role=Role.MIXED, worker_id=worker_id, model=Path("m"))


@pytest.mark.parametrize("worker_id", ["decode-1", "my_pod-7f9c.ns", "x" * 253])
def test_ids_as_people_and_clusters_write_them(worker_id: str) -> None:
    assert WorkerConfig(role=Role.MIXED, worker_id=worker_id, model=Path("m")).worker_id == worker_id


@pytest.mark.parametrize(
    ("option", "value"),
    [("--port", "70000"), ("--admin-port", "-1"), ("--block-size", "0"), ("--threads", "0"), ("--kv-bytes", "1Q")],
)
def test_numbers_out_of_range_name_their_option(option: str, value: str) -> None:
    app = typer.Typer()
    app.command()(main)
    done = CliRunner().invoke(app, ["--model", "nowhere", option, value])
    assert done.exit_code == 2
    assert option in done.output
