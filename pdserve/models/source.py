"""Where a model comes from: a folder, a GGUF file, or a name on a Hugging Face hub; all end as a folder."""

from __future__ import annotations

import re
import shutil
from hashlib import sha256
from pathlib import Path

from filelock import FileLock, Timeout

from pdserve.errors import ConfigError
from pdserve.models.folder import CONFIG, WEIGHTS_GGUF, sync

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Weights in pickle-based formats are never fetched.
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]
_TIMEOUT_S = 600.0
# Rises when what is written beside a GGUF file's weights changes.
_DESCRIPTION = 1


def check_model(name: str | Path) -> None:
    """Look at nothing but the name.

    Raises:
        ConfigError: it can be no model.
    """
    if not Path(name).exists() and not _HUB_NAME.fullmatch(str(name)):
        raise ConfigError(f"The model {name} does not exist, and a name on a hub is written organisation/model.")


def resolve_model(name: str | Path, cache_dir: Path) -> Path:
    """The folder of the model `name`; a GGUF file is described there and a hub's files are fetched, once.

    Args:
        name: a folder, a GGUF file, a folder with one GGUF file, or `organisation/model` where there is no such folder.
        cache_dir: where folders are made.

    Raises:
        ConfigError: one sentence that says what is missing or not supported.
    """
    path = Path(name)
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if (path / CONFIG).is_file() or len(files) != 1:
            return path
        path = files[0]
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConfigError(f"The model {path} is a file; supported: a model folder or a file that ends in .gguf.")
        return _described(path.resolve(), cache_dir)
    check_model(name)
    return _fetched(str(name), cache_dir)


def _described(path: Path, cache_dir: Path) -> Path:
    """A folder named as the file, with its config, its tokeniser and a link to it."""
    stat = path.stat()
    stamp = sha256(f"{_DESCRIPTION} {path} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache_dir / "models" / "gguf" / stamp / path.stem
    if folder.is_dir():
        return folder
    from pdserve.models.gguf_import import describe  # torch and gguf: only where a file is new

    staging = folder.with_name(f".{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / "lock", timeout=_TIMEOUT_S):
            if folder.is_dir():  # another process has made it meanwhile
                return folder
            shutil.rmtree(staging, ignore_errors=True)  # a killed process's
            staging.mkdir()
            try:
                describe(path, staging)
                for made in staging.iterdir():
                    if made.name != WEIGHTS_GGUF:
                        sync(made)
                staging.rename(folder)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
            sync(folder.parent)
    except Timeout as error:
        raise ConfigError(f"Another process has been reading {path} for {_TIMEOUT_S:.0f} s.") from error
    except OSError as error:
        raise ConfigError(f"What {path} says cannot be kept in {folder.parent}: {error.strerror}.") from error
    return folder


def _fetched(name: str, cache_dir: Path) -> Path:
    """The files of a hub's model; those that are there are not fetched again, and without a hub they do."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise ConfigError(
            f"The model {name} is no folder here, and to fetch it from a hub huggingface_hub must be installed."
        ) from error
    folder = cache_dir / "models" / "hub" / name
    try:
        snapshot_download(name, local_dir=folder, allow_patterns=_HUB_FILES)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        if (folder / CONFIG).is_file():
            return folder
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ConfigError(f"The model {name} is no folder here, and no hub gives it: {reason}.") from error
    return folder
