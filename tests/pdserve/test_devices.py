"""Where a worker computes, and which kernels that brings, without a GPU at hand."""

from __future__ import annotations

import logging

import pytest
import torch

from pdserve.devices import resolve_device
from pdserve.errors import ConfigError
from pdserve.kernels import choose, flashinfer


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("name", "device"), [("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1"), ("cpu", "cpu")]
)
def test_a_name_becomes_a_device(name: str, device: str) -> None:
    assert resolve_device(name) == torch.device(device)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("name", ["cuda:2", "gpu", "cuda:", "mps", ""])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        resolve_device(name)


def test_without_a_gpu_auto_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match="sees no CUDA device"):
        resolve_device("cuda:0")


@pytest.mark.parametrize("name", ["flashinfer", "sdpa"])
def test_kernels_of_another_device_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="run on CUDA"):
        choose(name)
    with pytest.raises(ConfigError, match="run on the CPU"):
        choose("native", device=torch.device("cuda", 0))


@pytest.mark.parametrize(("head_dim", "dtype"), [(96, torch.bfloat16), (128, torch.float32)])
def test_flashinfer_tells_what_it_has_no_kernels_for(head_dim: int, dtype: torch.dtype) -> None:
    with pytest.raises(flashinfer.FlashInferUnavailable, match=r"not (of 96|in torch\.float32)"):
        flashinfer.load(torch.device("cuda", 0), head_dim, dtype)


def test_without_flashinfer_the_fallback_says_that_it_is_slow(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(device: torch.device, head_dim: int, dtype: torch.dtype) -> flashinfer.FlashInferKernels:
        raise flashinfer.FlashInferUnavailable("the package is not installed")

    monkeypatch.setattr(flashinfer, "load", missing)
    with caplog.at_level(logging.WARNING):
        assert choose("auto", device=torch.device("cuda", 0)).name == "sdpa"
    assert "several times slower" in caplog.text
    with pytest.raises(ConfigError, match="not available"):
        choose("flashinfer", device=torch.device("cuda", 0))
