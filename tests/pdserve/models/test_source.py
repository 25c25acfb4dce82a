"""A model is found whatever form its name has; what is not found is told in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from pdserve.errors import ConfigError
from pdserve.models.source import check_model, resolve_model


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub that has every model; clear the list's first entry to make it unreachable."""
    fetched: list[str] = ["reachable"]

    def download(name: str, *, local_dir: Path, allow_patterns: list[str]) -> str:
        assert not any(pattern.endswith(("bin", "pt", "py")) for pattern in allow_patterns)
        if fetched[0] != "reachable":
            raise LocalEntryNotFoundError("Cannot reach the hub.\nMore of it.")
        local_dir.mkdir(parents=True, exist_ok=True)
        (local_dir / "config.json").write_text("{}")
        fetched.append(name)
        return str(local_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return fetched


def test_a_folder_is_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "one.gguf").write_text("")  # a folder that is one stays one
    assert resolve_model(tmp_path, tmp_path / "cache") == tmp_path


def test_a_hub_name_is_fetched_into_a_folder_of_that_name(downloads: list[str], tmp_path: Path) -> None:
    folder = resolve_model(Path("org/Name-1.5B"), tmp_path)
    assert folder.name == "Name-1.5B"
    assert downloads[1:] == ["org/Name-1.5B"]


def test_without_a_hub_what_was_fetched_still_serves(downloads: list[str], tmp_path: Path) -> None:
    folder = resolve_model("org/name", tmp_path)
    downloads[0] = "gone"
    assert resolve_model("org/name", tmp_path) == folder
    with pytest.raises(ConfigError, match=r"^The model org/other is no folder here, .*: Cannot reach the hub\.$"):
        resolve_model("org/other", tmp_path)


@pytest.mark.parametrize("name", ["/nowhere", "a/b/c", "../x", "org/", "file.gguf", "org/na me"])
def test_what_can_be_no_model_is_refused(name: str, downloads: list[Any], tmp_path: Path) -> None:
    for refuse in (check_model, lambda name: resolve_model(name, tmp_path)):
        with pytest.raises(ConfigError, match="does not exist"):
            refuse(name)
    assert downloads == ["reachable"]


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_text("")
    with pytest.raises(ConfigError, match=r"is a file; supported: a model folder or a file that ends in \.gguf"):
        resolve_model(tmp_path / "model.bin", tmp_path)
