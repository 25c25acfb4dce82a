"""A run folder is private and goes with its owner; what a killed owner left goes with the next."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pdserve.errors import ConfigError
from pdserve.launch.folders import RunFolder, cache_folder, runtime_folder

ROOT = Path(__file__).resolve().parents[3]


def test_it_goes_at_the_end(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        (folder / "thing.log").write_text("x")
        assert folder.stat().st_mode & 0o777 == 0o700
    assert list(tmp_path.iterdir()) == []


def test_one_in_use_stays_and_one_of_a_killed_process_goes(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from pdserve.launch.folders import RunFolder
import signal
with RunFolder(Path({str(tmp_path)!r})) as folder:
    print(folder, flush=True)
    signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        left = Path(process.stdout.readline().strip())
        with RunFolder(tmp_path):
            assert left.exists()
        process.send_signal(signal.SIGKILL)
    assert left.exists()
    with RunFolder(tmp_path) as folder:
        assert list(tmp_path.iterdir()) == [folder]


def test_a_parent_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="/nowhere"), RunFolder(Path("/nowhere")):
        pass


def test_places_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDSERVE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("PDSERVE_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "pdserve"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
    assert runtime_folder() == Path("/tmp")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/" + "x" * 200)  # too long for a socket's address
    assert runtime_folder() == Path("/tmp")
