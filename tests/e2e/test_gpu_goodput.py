"""The goodput part of `make gpu-check`, whole, on the CPU: real workers of a dummy model, mixed and disaggregated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pdserve.bench.gpu import goodput
from pdserve.bench.gpu.__main__ import run
from pdserve.bench.gpu.drive import Setup

pytest.importorskip("matplotlib", reason="requirements/loadtest.txt is not installed")
pytestmark = pytest.mark.e2e


def test_two_workers_mixed_against_disaggregated(tmp_path: Path) -> None:
    setup = Setup(torch.device("cpu"), "tiny", tmp_path, kv_bytes=64 << 20)
    assert run(setup, ["goodput-long"], tmp_path / "gpu.json")
    found = json.loads((tmp_path / "gpu.json").read_text())["goodput-long"]
    assert found["slo"] == {"ttft_s": 2.0, "tpot_s": 0.025}
    assert "--mixed 2" in found["settings"]["mixed"]
    for name in ("mixed", "disaggregated"):
        [point] = found[name]["points"]
        assert (point["rate_rps"], point["requests"], point["failed"]) == (2.0, 6, 0)
        # Only where a decode worker takes over from a prefill worker is there a hand-over.
        assert bool(point["handoff_s"]) == (name == "disaggregated")


def test_a_server_that_does_not_start_is_told_with_its_log(tmp_path: Path) -> None:
    setup = Setup(torch.device("cpu"), "tiny", tmp_path, kv_bytes=1)
    with pytest.raises(RuntimeError, match="holds no block of"):
        goodput.goodput(setup)
