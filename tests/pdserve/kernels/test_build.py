"""The library is compiled once and under a name that says for what, and its absence is a sentence, never a crash."""

from __future__ import annotations

import ctypes
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pdserve import kernels
from pdserve.errors import ConfigError
from pdserve.kernels import build as build_module
from pdserve.kernels.build import NativeUnavailable, build
from pdserve.kernels.reference import ReferenceKernels
from pdserve.kernels.self_check import check

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
TINY = 'extern "C" __attribute__((visibility("default"))) int pds_init() { return 7; }\n'


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source folder that compiles in no time."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "kernels.cpp").write_text(TINY)
    monkeypatch.setattr(build_module, "SOURCES", folder)
    return folder


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources compiled so far."""
    seen: list[str] = []
    run = build_module._run

    def spy(compiler: str, *arguments: str) -> str:
        seen.extend(argument for argument in arguments if argument.endswith(".cpp"))
        return run(compiler, *arguments)

    monkeypatch.setattr(build_module, "_run", spy)
    return seen


@needs_compiler
def test_the_second_build_finds_the_first(sources: Path, tmp_path: Path, compilations: list[str]) -> None:
    library = build(tmp_path / "cache")
    assert ctypes.CDLL(str(library)).pds_init() == 7
    assert build(tmp_path / "cache") == library
    assert compilations == [str(sources / "kernels.cpp")]


@needs_compiler
@pytest.mark.parametrize(
    "change",
    [
        lambda sources, patch: (sources / "kernels.cpp").write_text(TINY.replace("7", "8")),
        lambda sources, patch: (sources / "new.h").write_text("\n"),
        lambda sources, patch: patch.setattr(build_module, "FLAGS", (*build_module.FLAGS, "-DOTHER")),
        lambda sources, patch: patch.setattr(build_module, "_cpu_features", lambda: "another CPU"),
    ],
    ids=["source", "header", "flags", "cpu"],
)
def test_whatever_the_library_depends_on_changes_its_name(
    sources: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path, pytest.MonkeyPatch], object],
) -> None:
    before = build(tmp_path / "cache")
    change(sources, monkeypatch)
    after = build(tmp_path / "cache")
    assert before != after
    assert before.exists()
    assert after.exists()


@needs_compiler
def test_builders_that_race_all_get_a_whole_library(sources: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        libraries = list(pool.map(build, [tmp_path / "cache"] * 4))
    assert len(set(libraries)) == 1
    assert ctypes.CDLL(str(libraries[0])).pds_init() == 7
    assert list(libraries[0].parent.iterdir()) == [libraries[0]]


def test_no_compiler_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NativeUnavailable, match=r"no C\+\+ compiler is installed"):
        build(tmp_path / "cache")


@needs_compiler
def test_a_compiler_that_fails_is_unavailable_and_leaves_nothing(sources: Path, tmp_path: Path) -> None:
    (sources / "kernels.cpp").write_text("int main() { return nonsense; }\n")
    with pytest.raises(NativeUnavailable, match=r"failed: .*nonsense"):
        build(tmp_path / "cache")
    assert list((tmp_path / "cache" / "kernels").iterdir()) == []


@needs_compiler
def test_a_cache_that_cannot_be_written_is_unavailable(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(NativeUnavailable, match="cannot be written"):
        build(tmp_path / "cache")


def test_auto_without_native_is_reference_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.INFO, logger="pdserve"):
        chosen = kernels.choose("auto")
    assert isinstance(chosen, ReferenceKernels)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no C++ compiler" in caplog.text


def test_native_that_was_asked_for_must_be_possible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler"):
        kernels.choose("native")


def test_a_model_that_native_cannot_run_has_the_reference() -> None:
    assert kernels.choose("auto", head_dim=100).name == "reference"
    with pytest.raises(ConfigError, match="multiple of 8 up to 256, not 100"):
        kernels.choose("native", head_dim=100)
    with pytest.raises(ConfigError, match="at most 64 heads a kv head, not 65"):
        kernels.choose("native", head_dim=128, group=65)


def test_an_unknown_name_says_which_there_are() -> None:
    with pytest.raises(ConfigError, match="auto, native, flashinfer, sdpa, reference"):
        kernels.choose("fastest")


@needs_compiler
def test_auto_is_native_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pdserve"):
        assert kernels.choose("auto").name == "native"
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_the_self_check_accepts_the_reference() -> None:
    assert check(ReferenceKernels()) is None


@pytest.mark.parametrize("operation", ["rms_norm", "add_rms_norm", "silu_and_mul", "linear", "attention"])
def test_the_self_check_names_the_operation_that_is_wrong(operation: str) -> None:
    class Wrong(ReferenceKernels):
        pass

    def slightly_off(self: ReferenceKernels, *arguments: object) -> Tensor:
        right: Tensor = getattr(ReferenceKernels, operation)(self, *arguments)
        return torch.where(torch.arange(right.shape[-1]) == 1, right + 1.0, right).to(right.dtype)

    setattr(Wrong, operation, slightly_off)
    assert (check(Wrong()) or "").startswith(f"{operation} in ")


def test_the_self_check_sees_a_pool_that_was_not_written() -> None:
    class Forgetful(ReferenceKernels):
        def rope_append(self, qkv: Tensor, cos_sin: Tensor, batch: object, pool: Tensor, *rest: int) -> None:
            super().rope_append(qkv, cos_sin, batch, pool.clone(), *rest)  # type: ignore[arg-type]

    assert (check(Forgetful()) or "").startswith("the pool in ")
