"""What `make gpu-check` runs on a GPU runs here on the CPU, on a tiny shape: its own code, and that it can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pdserve.bench.gpu import correctness, goodput
from pdserve.bench.gpu.__main__ import PARTS, run
from pdserve.bench.gpu.drive import Setup
from pdserve.engine.sampler import Sampled
from pdserve.kernels import flashinfer
from pdserve.kernels.flashinfer import FlashInferKernels
from pdserve.kernels.sdpa import SdpaKernels
from tests.support.fake_flashinfer import FakeFlashInfer


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(torch.device("cpu"), "tiny", tmp_path, kv_bytes=16 << 20)


def test_parts_run_and_are_kept_in_one_file(setup: Setup, tmp_path: Path) -> None:
    path = tmp_path / "results" / "gpu.json"
    assert run(setup, ["text"], path)
    assert run(setup, ["sampler", "checksum", "disaggregated"], path)
    result = json.loads(path.read_text())
    assert set(result) == {"setting", "text", "sampler", "checksum", "disaggregated"}
    assert result["checksum"]["by"] == "host"
    assert result["text"]["the_likeliest"] == 144
    assert result["disaggregated"]["equal"] is True
    assert result["setting"]["shape"] == "tiny"
    assert result["setting"]["packages"]["numpy"]


def test_speed_is_set_beside_floors_and_transformers(setup: Setup, tmp_path: Path) -> None:
    """Figures of a CPU say nothing; that all is there, and of one run, does."""
    pytest.importorskip("transformers", reason="requirements/dev.txt is not installed")
    path = tmp_path / "gpu.json"
    assert run(setup, ["floors", "layout", "decode", "prefill", "tier", "transformers"], path)
    result = json.loads(path.read_text())
    assert set(result["decode"]["1x1024"]) == set(result["prefill"]["2048"]) - {"mfu"} == {"ms", "floor_ms", "ratio"}
    assert result["decode"]["32x8192"] == "longer than this model allows"
    assert result["decode"]["64x1024"] == "the pool is too small"
    assert {"to_host", "to_device"} < set(result["tier"])
    assert result["transformers"]["ratio"] == pytest.approx(
        result["transformers"]["step_ms"] / result["transformers"]["ours_ms"]
    )
    assert "do not read through strides" in result["layout"]["skipped"]


def test_backends_are_timed_over_the_same_batch(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def load(device: torch.device, head_dim: int, dtype: torch.dtype, prefill: str) -> FlashInferKernels:
        asked.append(prefill)
        return FlashInferKernels(FakeFlashInfer(), device, prefill)

    assert PARTS["backends"](setup) == {"skipped": "it runs on CUDA"}
    monkeypatch.setattr(flashinfer, "load", load)
    found = PARTS["backends"](setup)["64"]
    assert isinstance(found, dict)
    assert asked == ["fa2", "fa3"]
    assert found["fa3_over_fa2"] == pytest.approx(found["fa3_ms"] / found["fa2_ms"])


def test_without_the_default_model_its_text_is_skipped(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(correctness, "cache_folder", lambda: tmp_path)
    assert "pdserve up` fetches it" in str(PARTS["text-default"](setup)["skipped"])


def test_a_load_that_cannot_be_made_is_told(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(goodput, "_NEEDED", ("json", "of_no_such_package"))
    assert "of_no_such_package cannot be imported" in str(PARTS["goodput"](setup)["skipped"])


def test_a_wrong_kernel_is_told(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correctness, "_HEADS", ((4, 2, 64),))
    assert run(setup, ["kernels"], tmp_path / "good.json")
    right = SdpaKernels.attention
    monkeypatch.setattr(SdpaKernels, "attention", lambda *args, **more: right(*args, **more) * 1.01)
    assert not run(setup, ["kernels"], tmp_path / "wrong.json")
    assert "attention (decode)" in json.loads((tmp_path / "wrong.json").read_text())["kernels"]["error"]


def test_a_wrong_token_is_told(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    from pdserve.engine.runner import Runner

    right = Runner.collect
    monkeypatch.setattr(Runner, "collect", lambda *args: [[Sampled(7)] for _ in right(*args)])
    with pytest.raises(correctness.Wrong, match="below the reference"):
        PARTS["text"](setup)


def test_without_a_gpu_it_says_so_in_one_sentence() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run([sys.executable, "-m", "pdserve.bench.gpu"], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stderr.startswith("gpu-check needs a GPU: ")
    assert done.stderr.count("\n") == 1
